// SPDX-License-Identifier: Apache-2.0
// A thread converts two rows of VECTOR pixels: every sample is read once, and chroma needs no other thread.
//
// Set by the launch table: TYPE, VECTOR (even), THREADS, and the formula's constants.

#include "ltxrt.cuh"

__device__ __forceinline__ float unit(float value) { return fminf(fmaxf((value + 1.0f) * 0.5f, 0.0f), 1.0f); }

__device__ __forceinline__ unsigned char level(float value) {
    return static_cast<unsigned char>(__float2int_rn(value));
}

extern "C" __global__ void __launch_bounds__(THREADS)
rgb_to_yuv420(const TYPE* __restrict__ rgb, int height, int width, unsigned char* __restrict__ frames) {
    const int across = width / VECTOR;
    const int place = blockIdx.x * THREADS + threadIdx.x;
    if (place >= height / 2 * across) {
        return;
    }
    const int pair = place / across, column = place % across * VECTOR;
    const size_t plane = static_cast<size_t>(height) * width, frame = blockIdx.y;
    float colour[3][2][VECTOR];
#pragma unroll
    for (int channel = 0; channel < 3; ++channel) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const auto values = ltxrt::load<VECTOR>(
                rgb + (frame * 3 + channel) * plane + static_cast<size_t>(pair * 2 + row) * width + column);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                colour[channel][row][i] = unit(ltxrt::to_float(values.lane[i]));
            }
        }
    }
    unsigned char* const picture = frames + frame * (plane / 2 * 3);
    float brightness[2][VECTOR];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        ltxrt::Vector<unsigned char, VECTOR> levels;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            brightness[row][i] = KR * colour[0][row][i] + KG * colour[1][row][i] + KB * colour[2][row][i];
            levels.lane[i] = level(LUMA_OFFSET + LUMA_SCALE * brightness[row][i]);
        }
        ltxrt::store(picture + static_cast<size_t>(pair * 2 + row) * width + column, levels);
    }
    ltxrt::Vector<unsigned char, VECTOR / 2> blue, red;
#pragma unroll
    for (int i = 0; i < VECTOR / 2; ++i) {
        float mean[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float(&part)[2][VECTOR] = k < 3 ? colour[k] : brightness;
            mean[k] = (part[0][2 * i] + part[0][2 * i + 1] + part[1][2 * i] + part[1][2 * i + 1]) * 0.25f;
        }
        blue.lane[i] = level(CHROMA_OFFSET + (mean[2] - mean[3]) * (CHROMA_SCALE / CB_RANGE));
        red.lane[i] = level(CHROMA_OFFSET + (mean[0] - mean[3]) * (CHROMA_SCALE / CR_RANGE));
    }
    unsigned char* const chroma = picture + plane + static_cast<size_t>(pair) * (width / 2) + column / 2;
    ltxrt::store(chroma, blue);
    ltxrt::store(chroma + plane / 4, red);
}
