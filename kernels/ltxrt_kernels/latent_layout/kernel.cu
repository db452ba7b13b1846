// SPDX-License-Identifier: Apache-2.0
// A transpose through shared memory: a block reads a tile along the source's rows and writes it along the target's.
// One row more than the tile is wide keeps both ways at two threads a bank.
//
// Set by the launch table: TYPE, OUT, CHANNELS, PACK (1: grid to tokens, 0: tokens to grid), TILE, THREADS,
// READ and WRITE (values an access, source and target).

#include "ltxrt.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
latent_layout(const TYPE* __restrict__ source, const float* __restrict__ mean, const float* __restrict__ std,
              int tokens, OUT* __restrict__ out) {
    __shared__ float tile[TILE][TILE + 1];
    // The source is [rows, columns], the target [columns, rows].
    const int rows = PACK ? CHANNELS : tokens, columns = PACK ? tokens : CHANNELS;
    const int first_row = blockIdx.y * TILE, first_column = blockIdx.x * TILE;
    constexpr int kReads = TILE / READ, kWrites = TILE / WRITE;
    for (int index = threadIdx.x; index < TILE * kReads; index += THREADS) {
        const int row = index / kReads, column = index % kReads * READ;
        if (first_row + row < rows && first_column + column < columns) {
            const auto values = ltxrt::load<READ>(source + static_cast<size_t>(first_row + row) * columns +
                                                  first_column + column);
#pragma unroll
            for (int i = 0; i < READ; ++i) {
                tile[row][column + i] = ltxrt::to_float(values.lane[i]);
            }
        }
    }
    __syncthreads();
    for (int index = threadIdx.x; index < TILE * kWrites; index += THREADS) {
        const int column = index / kWrites, row = index % kWrites * WRITE;
        if (first_row + row < rows && first_column + column < columns) {
            float results[WRITE];
#if PACK
            const auto means = ltxrt::load<WRITE>(mean + first_row + row);
            const auto deviations = ltxrt::load<WRITE>(std + first_row + row);
#pragma unroll
            for (int i = 0; i < WRITE; ++i) {
                results[i] = (tile[row + i][column] - means.lane[i]) / deviations.lane[i];
            }
#else
            const float factor = std[first_column + column], offset = mean[first_column + column];
#pragma unroll
            for (int i = 0; i < WRITE; ++i) {
                results[i] = tile[row + i][column] * factor + offset;
            }
#endif
            ltxrt::store(out + static_cast<size_t>(first_column + column) * rows + first_row + row, results);
        }
    }
}
