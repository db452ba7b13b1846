// SPDX-License-Identifier: Apache-2.0
// What TensorRT's Python bindings need to load, and something for them to call.
//
// The bindings import nine C symbols of three libraries and reach everything else through virtual calls on the objects
// that these return. Compiled once per library (-DNVINFER, -DPLUGIN, -DPARSER), this file gives those symbols; with
// -DOBJECTS the factories return an object each of whose virtual functions, whatever its place in the table, answers
// with the object itself: as a pointer it is another such object, as a number it is positive, as a truth value true,
// as a text "{} ". So every call of ours passes the bindings' own conversion of arguments and results.
// ``answer(0)`` makes every call fail until ``answer_as_usual()``.
//
// This is no TensorRT: nothing is parsed, and nothing is built.

#include <cstddef>
#include <cstring>
#include <new>
#include <sys/mman.h>

#ifdef OBJECTS
namespace {

// An address that is a small positive number, and whose lowest byte is not 0.
constexpr std::size_t kArea = 0x100000;
constexpr std::size_t kAreaBytes = 0x400000;
constexpr std::size_t kObject = kArea + 0x10;
// The table of virtual functions is moved to where its address, which an object begins with, reads as the text "{} ".
constexpr std::size_t kTable = 0x207d7b;
constexpr std::size_t kFunctions = 190;
constexpr std::size_t kBeforeTable = 2 * sizeof(void*);  // offset to the object's top, and its type

std::size_t answer_with = kObject;

class Anything {
  public:
#define CALL(n) \
    virtual std::size_t call##n() { return answer_with; }
#define TEN(n) \
    CALL(n##0) CALL(n##1) CALL(n##2) CALL(n##3) CALL(n##4) CALL(n##5) CALL(n##6) CALL(n##7) CALL(n##8) CALL(n##9)
    TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9)
    TEN(10) TEN(11) TEN(12) TEN(13) TEN(14) TEN(15) TEN(16) TEN(17) TEN(18) TEN(19)
    // Public interfaces hold a pointer to their implementation right after the table.
    void* implementation = reinterpret_cast<void*>(kObject);
};

[[maybe_unused]] void* object() {
    static void* made = nullptr;
    if (made == nullptr) {
        void* area = mmap(reinterpret_cast<void*>(kArea), kAreaBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        if (area != reinterpret_cast<void*>(kArea)) return nullptr;
        made = new (reinterpret_cast<void*>(kObject)) Anything;
        char* table = *reinterpret_cast<char**>(made);
        std::memcpy(reinterpret_cast<void*>(kTable - kBeforeTable), table - kBeforeTable,
                    kBeforeTable + kFunctions * sizeof(void*));
        *reinterpret_cast<std::size_t*>(made) = kTable;
    }
    return made;
}

}  // namespace

extern "C" void answer(std::size_t value) { answer_with = value; }
extern "C" void answer_as_usual() { answer_with = kObject; }
#else
namespace {
[[maybe_unused]] void* object() { return nullptr; }
}  // namespace
#endif

extern "C" {
#ifdef NVINFER
void* createInferBuilder_INTERNAL(void*, int) { return object(); }
void* createInferRuntime_INTERNAL(void*, int) { return object(); }
void* createInferRefitter_INTERNAL(void*, void*, int) { return object(); }
void* getPluginRegistry() { return nullptr; }
void* getBuilderPluginRegistry(int) { return nullptr; }
#endif
#ifdef PLUGIN
int initLibNvInferPlugins(void*, char const*) { return 0; }
#endif
#ifdef PARSER
void* createNvOnnxParser_INTERNAL(void*, void*, int) {
#ifdef OBJECTS
    return reinterpret_cast<void*>(kObject);
#else
    return nullptr;
#endif
}
void* createNvOnnxParserRefitter_INTERNAL(void*, void*, int) { return nullptr; }
int getNvOnnxParserVersion() { return 0; }
#endif
}
