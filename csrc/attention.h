// Attention of new tokens to cached keys, spread over the threads.
#ifndef BITTERN_ATTENTION_H
#define BITTERN_ATTENTION_H

#include "context.h"
#include "vector_ops.h"

namespace bittern {

// Consecutive new tokens of one sequence.
struct Segment {
    int row;       // of the first one among all rows
    int tokens;
    int position;  // of the first one in its sequence
    float *out;    // of the first one
};

struct Attention {
    int heads, kv_heads, size, width;  // size of a head, and that filled up to a multiple of 16
    int window;
    float cap;
    const float *slopes;      // [heads] or null
    const float *queries;     // [kv_heads][rows][heads / kv_heads][width], scaled
    int rows;
    const Segment *segments;
    int count;
    const HeadCache *caches;  // [count][kv_heads]
    ptrdiff_t token_stride, head_stride;  // of the output, in floats
};

// 0 or BT_NO_MEMORY; the caller holds the context.
int attention(bt_context *c, const Attention &a);

// Below this a stage costs more than it brings.
constexpr int64_t worth_sharing_ns = 3000;

// f(job, thread) for all jobs, on the caller alone when they are done sooner so.
template <typename F>
void spread(Pool &pool, int jobs, int64_t nanoseconds, F &&f) {
    if (nanoseconds >= worth_sharing_ns) {
        pool.run(jobs, static_cast<F &&>(f));
    } else {
        for (int job = 0; job < jobs; job++) f(job, 0);
    }
}

}  // namespace bittern

#endif
