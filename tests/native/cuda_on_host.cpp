/* folds.cu for the host, and a way to launch one of its kernels. */
#include "cuda_on_host.h"
#include "folds.cu"

extern "C" void launch(void (*kernel)(Fold), const Fold *fold, unsigned blocks, unsigned threads) {
    gridDim.x = blocks, blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) kernel(*fold);
}
