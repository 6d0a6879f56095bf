// What a decoder does between its matrices: one source, compiled once per instruction set.
//
// Every file of kernels includes this one and gets functions of its own (static), so that no code of a newer
// instruction set can leak into an older one. Loops are written for the compiler to vectorize.
#ifndef BITTERN_OPS_H
#define BITTERN_OPS_H

#include "kernels.h"

namespace bittern {

struct VectorOps {
    // out[i] = x[i] / rms(x) * weight[i]
    void (*rms_norm)(const float *x, const float *weight, float epsilon, int size, float *out);
};

namespace {

void rms_norm(const float *x, const float *weight, float epsilon, int size, float *out) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < size; i++) sum += x[i] * x[i];
    const float factor = 1.0f / __builtin_sqrtf(sum / static_cast<float>(size) + epsilon);
    for (int i = 0; i < size; i++) out[i] = x[i] * factor * weight[i];
}

const VectorOps ops = {rms_norm};

}  // namespace

}  // namespace bittern

#endif
