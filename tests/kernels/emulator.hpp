// SPDX-License-Identifier: Apache-2.0
// Runs a kernel's own source on the CPU: one block after another, each thread a coroutine. The threads of a warp meet at
// shuffles; a warp runs as far as the next barrier before another one gets its turn, first warps first and then last
// warps first, so that what relies on a missing barrier goes wrong. Conversions are the toolkit's, from the same headers
// that the GPU's compiler reads. What it cannot show is anything about memory order or time.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#undef __shared__
#define __shared__ static  // there is only one block at a time
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace emulator {

constexpr size_t kStackBytes = 128 * 1024;

inline uint3 thread, block;
inline ucontext_t scheduler;
inline ucontext_t* current;
inline std::vector<float> lanes;
inline std::vector<char> finished, waiting;
inline void (*body)();

inline void yield() { swapcontext(current, &scheduler); }

inline void entry() {
    body();
    finished[thread.x] = 1;
    yield();
}

inline void barrier() {
    waiting[thread.x] = 1;
    yield();
}

inline float exchange(float value, int mask) {
    const unsigned self = thread.x;
    lanes[self] = value;
    yield();
    const float other = lanes[self ^ mask];
    yield();
    return other;
}

// Until each of the warp's threads has ended or waits at a barrier.
inline void run_warp(std::vector<ucontext_t>& contexts, unsigned begin, unsigned end) {
    bool moving = true;
    while (moving) {
        moving = false;
        for (unsigned i = begin; i < end; ++i) {
            if (!finished[i] && !waiting[i]) {
                thread = {i, 0, 0};
                current = &contexts[i];
                swapcontext(&scheduler, current);
                moving = moving || (!finished[i] && !waiting[i]);
            }
        }
    }
}

inline void run_block(unsigned threads) {
    static std::vector<char> stacks;
    stacks.resize(threads * kStackBytes);
    std::vector<ucontext_t> contexts(threads);
    lanes.assign(threads, NAN);
    finished.assign(threads, 0);
    for (unsigned i = 0; i < threads; ++i) {
        getcontext(&contexts[i]);
        contexts[i].uc_stack.ss_sp = &stacks[i * kStackBytes];
        contexts[i].uc_stack.ss_size = kStackBytes;
        contexts[i].uc_link = &scheduler;
        makecontext(&contexts[i], entry, 0);
    }
    const unsigned warps = (threads + 31) / 32;
    for (bool forward = true; std::count(finished.begin(), finished.end(), 0) > 0; forward = !forward) {
        waiting.assign(threads, 0);
        for (unsigned i = 0; i < warps; ++i) {
            const unsigned warp = forward ? i : warps - 1 - i;
            run_warp(contexts, warp * 32, std::min(threads, warp * 32 + 32));
        }
    }
}

template <typename P>
P argument(void* value) {
    if constexpr (std::is_pointer_v<P>) {
        return static_cast<P>(value);
    } else {
        return *static_cast<P*>(value);
    }
}

template <typename... P, size_t... I>
void launch(void (*kernel)(P...), void** arguments, std::index_sequence<I...>, const unsigned* grid, unsigned threads) {
    static void (*function)(P...);
    static void** values;
    function = kernel;
    values = arguments;
    body = [] { function(argument<P>(values[I])...); };
    for (unsigned z = 0; z < grid[2]; ++z) {
        for (unsigned y = 0; y < grid[1]; ++y) {
            for (unsigned x = 0; x < grid[0]; ++x) {
                block = {x, y, z};
                run_block(threads);
            }
        }
    }
}

// The number of arguments is checked by the caller, which cannot know it otherwise.
template <typename... P>
int launch(void (*kernel)(P...), void** arguments, int count, const unsigned* grid, unsigned threads) {
    if (count != sizeof...(P)) {
        return 1;
    }
    launch(kernel, arguments, std::make_index_sequence<sizeof...(P)>(), grid, threads);
    return 0;
}

}  // namespace emulator

#define threadIdx emulator::thread
#define blockIdx emulator::block

inline void __syncthreads() { emulator::barrier(); }
inline float __shfl_xor_sync(unsigned, float value, int mask) { return emulator::exchange(value, mask); }
template <typename T>
void __stwb(T* address, T value) {
    *address = value;
}
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyint(value)); }
using std::min;
