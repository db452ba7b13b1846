// SPDX-License-Identifier: Apache-2.0
// A thread adds one vector. `out` may be `residual`: every element is read and written by the same thread, so neither
// is declared __restrict__.
//
// Set by the launch table: TYPE, WIDTH, VECTOR, THREADS.

#include "ltxrt.cuh"

constexpr int kVectors = WIDTH / VECTOR;

extern "C" __global__ void __launch_bounds__(THREADS)
gated_residual(const TYPE* residual, const TYPE* __restrict__ update, const TYPE* __restrict__ gate,
               const long long* __restrict__ token_row, int tokens, TYPE* out) {
    const size_t vector = static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (vector >= static_cast<size_t>(tokens) * kVectors) {
        return;
    }
    const size_t token = vector / kVectors;
    const int column = static_cast<int>(vector % kVectors) * VECTOR;
    const size_t row = static_cast<size_t>(token_row[token]) * WIDTH;
    const auto kept = ltxrt::load<VECTOR>(residual + token * WIDTH + column);
    const auto added = ltxrt::load<VECTOR>(update + token * WIDTH + column);
    const auto gates = ltxrt::load<VECTOR>(gate + row + column);
    float results[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        results[i] = ltxrt::to_float(kept.lane[i]) + ltxrt::to_float(added.lane[i]) * ltxrt::to_float(gates.lane[i]);
    }
    ltxrt::store(out + token * WIDTH + column, results);
}
