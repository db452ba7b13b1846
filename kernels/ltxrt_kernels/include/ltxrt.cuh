// SPDX-License-Identifier: Apache-2.0
// What the kernels share: 16-byte accesses, conversions to and from fp32, a sum over a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

namespace ltxrt {

// FP8 E4M3 without infinities, as TensorRT and ONNX (FLOAT8E4M3FN) have it.
struct E4m3 {
    __nv_fp8_storage_t bits;
};

// N neighbours that move in one access; the address has to be aligned to all of it.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
    T lane[N];
};

// What the hardware moves in one access of that many bytes.
template <int Bytes>
struct Access;
template <>
struct Access<1> { using Type = unsigned char; };
template <>
struct Access<2> { using Type = unsigned short; };
template <>
struct Access<4> { using Type = unsigned int; };
template <>
struct Access<8> { using Type = uint2; };
template <>
struct Access<16> { using Type = uint4; };

template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load(const T* address) {
    const auto raw = *reinterpret_cast<const typename Access<sizeof(T) * N>::Type*>(address);
    Vector<T, N> packed;
    memcpy(&packed, &raw, sizeof raw);
    return packed;
}

template <typename T, int N>
__device__ __forceinline__ void store(T* address, const Vector<T, N>& packed) {
    typename Access<sizeof(T) * N>::Type raw;
    memcpy(&raw, &packed, sizeof raw);
    // A plain assignment may be split into its parts (NVRTC 13.0 does so after a division).
    __stwb(reinterpret_cast<decltype(raw)*>(address), raw);
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void convert(float value, float& out) { out = value; }
__device__ __forceinline__ void convert(float value, __half& out) { out = __float2half_rn(value); }
__device__ __forceinline__ void convert(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }

template <int N, typename T>
__device__ __forceinline__ void store(T* address, const float (&values)[N]) {
    Vector<T, N> packed;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        convert(values[i], packed.lane[i]);
    }
    store(address, packed);
}

// Beyond +-448 the value saturates. The instruction converts two at a time.
template <int N>
__device__ __forceinline__ void store(E4m3* address, const float (&values)[N]) {
    Vector<E4m3, N> packed;
    if constexpr (N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const __nv_fp8x2_storage_t pair =
                __nv_cvt_float2_to_fp8x2(make_float2(values[i], values[i + 1]), __NV_SATFINITE, __NV_E4M3);
            packed.lane[i].bits = static_cast<__nv_fp8_storage_t>(pair & 0xff);
            packed.lane[i + 1].bits = static_cast<__nv_fp8_storage_t>(pair >> 8);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            packed.lane[i].bits = __nv_cvt_float_to_fp8(values[i], __NV_SATFINITE, __NV_E4M3);
        }
    }
    store(address, packed);
}

// The sum of every thread's value, given to every thread in the same order of additions. A second call of a kernel
// needs its own `partial`, or a barrier in between.
template <int Threads>
__device__ __forceinline__ float block_sum(float value, float (&partial)[Threads / 32]) {
    static_assert(Threads % 32 == 0, "whole warps");
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    if constexpr (Threads > 32) {
        if (threadIdx.x % 32 == 0) {
            partial[threadIdx.x / 32] = value;
        }
        __syncthreads();
        value = 0.0f;
#pragma unroll
        for (int warp = 0; warp < Threads / 32; ++warp) {
            value += partial[warp];
        }
    }
    return value;
}

}  // namespace ltxrt
