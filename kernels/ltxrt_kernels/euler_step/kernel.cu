// SPDX-License-Identifier: Apache-2.0
// A thread updates one vector. `out` may be `latent`, so neither is declared __restrict__. The noise levels lie in
// device memory: a captured graph serves every step of the schedule.
//
// Set by the launch table: TYPE (of the velocity; the rest is fp32), WIDTH (channels), VECTOR, THREADS.

#include "ltxrt.cuh"

constexpr int kVectors = WIDTH / VECTOR;

extern "C" __global__ void __launch_bounds__(THREADS)
euler_step(const float* latent, const TYPE* __restrict__ velocity, const float* __restrict__ clean,
           const float* __restrict__ mask, const float* __restrict__ sigma, const float* __restrict__ sigma_next,
           int tokens, float* out) {
    const size_t vector = static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (vector >= static_cast<size_t>(tokens) * kVectors) {
        return;
    }
    const size_t token = vector / kVectors, offset = vector * VECTOR;
    const auto now = ltxrt::load<VECTOR>(latent + offset);
    const auto flow = ltxrt::load<VECTOR>(velocity + offset);
    const auto held = ltxrt::load<VECTOR>(clean + offset);
    const float share = mask[token], level = sigma[0], step = sigma_next[0] - level;
    float results[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        const float denoised =
            (now.lane[i] - ltxrt::to_float(flow.lane[i]) * (share * level)) * share + held.lane[i] * (1.0f - share);
        results[i] = now.lane[i] + (now.lane[i] - denoised) / level * step;
    }
    ltxrt::store(out + offset, results);
}
