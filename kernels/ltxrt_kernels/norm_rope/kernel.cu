// SPDX-License-Identifier: Apache-2.0
// One block a run of neighbouring tokens, one after another. A thread holds both halves of the pairs that it turns, so
// a row is read once. Neighbours share the tables' rows of their frame and height, which then come from L1.
//
// Set by the launch table: TYPE, WIDTH, HEAD (width of a head), AXES (3 or 1), FREQUENCIES (an axis), VECTOR, THREADS,
// EPSILON.

#include "ltxrt.cuh"

constexpr int kHalf = HEAD / 2;
constexpr int kVectors = WIDTH / 2 / VECTOR;
constexpr int kRounds = (kVectors + THREADS - 1) / THREADS;
constexpr int kPadding = WIDTH / 2 - AXES * FREQUENCIES;

struct Turn {
    float cosine, sine;
};

// A row of an axis' table: FREQUENCIES cosines, and `stride` further on as many sines.
struct Axis {
    const float* row;
    int stride;
};

__device__ __forceinline__ Turn turn_of(const Axis (&axes)[AXES], int index) {
    const int slot = index - kPadding;
    if (slot < 0) {
        return {1.0f, 0.0f};
    }
    const int frequency = slot / AXES, axis = slot % AXES;
    const float* row = axes[0].row;
    int stride = axes[0].stride;
#pragma unroll
    for (int other = 1; other < AXES; ++other) {
        row = axis == other ? axes[other].row : row;
        stride = axis == other ? axes[other].stride : stride;
    }
    return {row[frequency], row[stride + frequency]};
}

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
norm_rope(const TYPE* __restrict__ x, const TYPE* __restrict__ weight, const float* __restrict__ rope_time,
#if AXES == 3
          const float* __restrict__ rope_height, const float* __restrict__ rope_width,
#endif
          int frames, int height, int width, int run, TYPE* __restrict__ out) {
    __shared__ float partial[2][THREADS / 32];
    const int tokens = frames * height * width;
    const int begin = blockIdx.x * run, end = min(begin + run, tokens);
    for (int token = begin; token < end; ++token) {
        const size_t base = static_cast<size_t>(token) * WIDTH;
        ltxrt::Vector<TYPE, VECTOR> first[kRounds], second[kRounds];
        float squares = 0.0f;
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            const int vector = round * THREADS + threadIdx.x;
            if (vector < kVectors) {
                const int index = vector * VECTOR;
                const int column = index / kHalf * HEAD + index % kHalf;
                first[round] = ltxrt::load<VECTOR>(x + base + column);
                second[round] = ltxrt::load<VECTOR>(x + base + column + kHalf);
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) {
                    const float a = ltxrt::to_float(first[round].lane[i]), b = ltxrt::to_float(second[round].lane[i]);
                    squares += a * a + b * b;
                }
            }
        }
        // The two halves of `partial` take turns: a thread can be one barrier ahead of another, not two.
        const float sum = ltxrt::block_sum<THREADS>(squares, partial[(token - begin) % 2]);
        const float inverse = rsqrtf(sum / WIDTH + EPSILON);
        const int frame = token / (height * width);
#if AXES == 3
        const int row = token / width % height, place = token % width;
        const Axis axes[AXES] = {{rope_time + frame * FREQUENCIES, frames * FREQUENCIES},
                                 {rope_height + row * FREQUENCIES, height * FREQUENCIES},
                                 {rope_width + place * FREQUENCIES, width * FREQUENCIES}};
#else
        const Axis axes[AXES] = {{rope_time + frame * FREQUENCIES, frames * FREQUENCIES}};
#endif
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            const int vector = round * THREADS + threadIdx.x;
            if (vector < kVectors) {
                const int index = vector * VECTOR;
                const int column = index / kHalf * HEAD + index % kHalf;
                const auto weight_first = ltxrt::load<VECTOR>(weight + column);
                const auto weight_second = ltxrt::load<VECTOR>(weight + column + kHalf);
                float turned_first[VECTOR], turned_second[VECTOR];
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) {
                    const Turn turn = turn_of(axes, index + i);
                    const float a =
                        ltxrt::to_float(first[round].lane[i]) * inverse * ltxrt::to_float(weight_first.lane[i]);
                    const float b =
                        ltxrt::to_float(second[round].lane[i]) * inverse * ltxrt::to_float(weight_second.lane[i]);
                    turned_first[i] = a * turn.cosine - b * turn.sine;
                    turned_second[i] = b * turn.cosine + a * turn.sine;
                }
                ltxrt::store(out + base + column, turned_first);
                ltxrt::store(out + base + column + kHalf, turned_second);
            }
        }
    }
}
