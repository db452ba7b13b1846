// SPDX-License-Identifier: Apache-2.0
// A thread scales one vector of one head; threads of a head read the same logit, which one access serves.
//
// Set by the launch table: TYPE, OUT, WIDTH, HEAD (width of a head), VECTOR, THREADS, QUANTISED.

#include "ltxrt.cuh"

constexpr int kVectors = WIDTH / VECTOR;
constexpr int kHeads = WIDTH / HEAD;

extern "C" __global__ void __launch_bounds__(THREADS)
head_gate(const TYPE* __restrict__ attended, const TYPE* __restrict__ logits,
#if QUANTISED
          const float* __restrict__ output_scale,
#endif
          int tokens, OUT* __restrict__ out) {
    const size_t vector = static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (vector >= static_cast<size_t>(tokens) * kVectors) {
        return;
    }
    const size_t token = vector / kVectors;
    const int column = static_cast<int>(vector % kVectors) * VECTOR;
    const auto values = ltxrt::load<VECTOR>(attended + token * WIDTH + column);
    const float logit = ltxrt::to_float(logits[token * kHeads + column / HEAD]);
    float gate = 2.0f / (1.0f + expf(-logit));
#if QUANTISED
    gate /= output_scale[0];
#endif
    float results[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        results[i] = ltxrt::to_float(values.lane[i]) * gate;
    }
    ltxrt::store(out + token * WIDTH + column, results);
}
