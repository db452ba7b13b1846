// SPDX-License-Identifier: Apache-2.0
// One block a token. The row stays in registers between the sum of its squares and the output, so it is read once;
// scale and shift are asked for before the barrier, so that their latency hides behind it.
//
// Set by the launch table: TYPE, OUT, WIDTH, VECTOR (values an access), THREADS, EPSILON, QUANTISED.

#include "ltxrt.cuh"

constexpr int kVectors = WIDTH / VECTOR;
constexpr int kRounds = (kVectors + THREADS - 1) / THREADS;

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
rms_norm_modulate(const TYPE* __restrict__ x, const TYPE* __restrict__ scale, const TYPE* __restrict__ shift,
                  const long long* __restrict__ token_row,
#if QUANTISED
                  const float* __restrict__ output_scale,
#endif
                  OUT* __restrict__ out) {
    __shared__ float partial[THREADS / 32];
    const size_t token = blockIdx.x;
    const size_t row = static_cast<size_t>(token_row[token]) * WIDTH;
    ltxrt::Vector<TYPE, VECTOR> values[kRounds], factors[kRounds], offsets[kRounds];
    float squares = 0.0f;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
        const int vector = round * THREADS + threadIdx.x;
        if (vector < kVectors) {
            values[round] = ltxrt::load<VECTOR>(x + token * WIDTH + vector * VECTOR);
            factors[round] = ltxrt::load<VECTOR>(scale + row + vector * VECTOR);
            offsets[round] = ltxrt::load<VECTOR>(shift + row + vector * VECTOR);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                const float value = ltxrt::to_float(values[round].lane[i]);
                squares += value * value;
            }
        }
    }
    const float inverse = rsqrtf(ltxrt::block_sum<THREADS>(squares, partial) / WIDTH + EPSILON);
#if QUANTISED
    const float quantum = 1.0f / output_scale[0];
#else
    const float quantum = 1.0f;
#endif
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
        const int vector = round * THREADS + threadIdx.x;
        if (vector < kVectors) {
            float results[VECTOR];
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                const float normal = ltxrt::to_float(values[round].lane[i]) * inverse;
                const float factor = 1.0f + ltxrt::to_float(factors[round].lane[i]);
                results[i] = (normal * factor + ltxrt::to_float(offsets[round].lane[i])) * quantum;
            }
            ltxrt::store(out + token * WIDTH + vector * VECTOR, results);
        }
    }
}
