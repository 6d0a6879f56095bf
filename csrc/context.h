// A context: threads, an instruction set, and memory for rounded inputs.
#ifndef BITTERN_CONTEXT_H
#define BITTERN_CONTEXT_H

#include <cstdlib>
#include <pthread.h>

#include "kernels.h"
#include "pool.h"

// Memory that grows and is kept; its content does not survive growing.
struct bt_scratch {
    void *data = nullptr;
    size_t size = 0;

    // 64-byte aligned, or null when there is no memory.
    void *take(size_t bytes) {
        if (bytes > size) {
            free(data);
            size = (bytes + 4095) / 4096 * 4096;
            data = aligned_alloc(64, size);
            if (data == nullptr) size = 0;
        }
        return data;
    }
    ~bt_scratch() { free(data); }
};

struct bt_context {
    bittern::Pool pool;
    const bittern::Kernels *kernels = nullptr;
    bt_scratch input;      // of linear()
    bt_scratch attention;  // of attention()
    bt_scratch decoder;    // of their callers
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
};

namespace bittern {

// Holds a context for one call.
struct Lock {
    explicit Lock(bt_context *c) : context(c) { pthread_mutex_lock(&c->mutex); }
    ~Lock() { pthread_mutex_unlock(&context->mutex); }
    bt_context *context;
};

struct Output {
    const bt_matrix *matrix;
    float *y;
    ptrdiff_t stride;
};

// False for a matrix that no kernel can take.
bool valid(const bt_matrix &m);

// One row of x, in stored order (in_features floats), to digits; filled-up columns and the tail become 0.
void quantize_row(const Kernels &k, const bt_matrix &m, const Layout &l, const float *x, int8_t *hi, int8_t *lo,
                  float *scales, float *sums);

// x W^T for matrices that share their input; the caller holds the context.
int linear(bt_context *c, const Output *outputs, int count, int activations, int rows, const float *x,
           ptrdiff_t x_stride);

}  // namespace bittern

#endif
