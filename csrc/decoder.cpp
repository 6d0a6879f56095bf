// One forward pass of a decoder of the Llama family: the same code for one token and for thousands of them.
//
// Tokens go through the layers at most 512 at a time, so that memory does not grow with the prompt. What lies between
// the matrices is done by the caller alone for a single token, where a stage would cost more, and row by row on all
// threads for many.
#include <cstring>

#include "attention.h"

namespace bittern {

namespace {

constexpr int most_rows = 512;
constexpr int rows_a_job = 4;
constexpr int floats_a_ns = 4;  // what rough estimates of row functions are made of

class Forward {
   public:
    Forward(bt_context *c, const bt_decoder &m, const bt_cache &cache, const bt_rope *ropes)
        : context_(c), ops_(*c->kernels->ops), m_(m), cache_(cache), ropes_(ropes) {
        repeat_ = m.heads / m.kv_heads;
        width_ = round_up(m.head_dim, head_quantum);
        queries_ = m.heads * m.head_dim;
        keys_ = m.kv_heads * m.head_dim;
    }

    int run(const int32_t *tokens, const int32_t *counts, const int32_t *lengths, float *logits) {
        int total = 0, active = 0;
        for (int s = 0; s < cache_.sequences; s++) {
            total += counts[s];
            if (counts[s] > 0) active++;
        }
        if (total == 0) return 0;
        if (!reserve(total < most_rows ? total : most_rows, active)) return BT_NO_MEMORY;
        int sequence = 0, done = 0, finished = 0;  // done: tokens of `sequence` in earlier chunks
        for (int first = 0; first < total; first += most_rows) {
            rows_ = total - first < most_rows ? total - first : most_rows;
            segments_ = 0;
            for (int row = 0; row < rows_;) {
                const int left = counts[sequence] - done, here = left < rows_ - row ? left : rows_ - row;
                if (here > 0) {
                    segment_[segments_] = {row, here, lengths[sequence] + done, attended_ + int64_t{row} * queries_};
                    sequence_[segments_++] = sequence;
                }
                row += here;
                done += here;
                if (done == counts[sequence] && row < rows_) sequence++, done = 0;
            }
            if (const int status = chunk(tokens + first)) return status;
            for (int s = 0; s < segments_; s++) {
                const Segment &part = segment_[s];
                if (part.position + part.tokens != lengths[sequence_[s]] + counts[sequence_[s]]) continue;
                const float *from = normed_ + int64_t{part.row + part.tokens - 1} * m_.hidden;
                memcpy(last_ + int64_t{finished++} * m_.hidden, from, sizeof(float) * m_.hidden);
            }
        }
        const Output out = {m_.head, logits, m_.vocabulary};
        if (const int status = linear(context_, &out, 1, m_.activations, active, last_, m_.hidden)) return status;
        if (m_.logit_cap > 0) {
            for (int s = 0; s < active; s++) ops_.cap(m_.logit_cap, m_.vocabulary, logits + int64_t{s} * m_.vocabulary);
        }
        return 0;
    }

   private:
    bool reserve(int rows, int active) {
        const int64_t hidden = m_.hidden, packed = int64_t{m_.heads} * width_;
        // What attention needs and what the MLP needs is never needed at once.
        const int64_t attention = 2 * queries_ + 2 * keys_ + packed, mlp = 2 * int64_t{m_.intermediate};
        const int64_t shared = attention > mlp ? attention : mlp;
        const int64_t threads_heads = int64_t{context_->pool.threads()} * width_;
        const int64_t floats = (3 * hidden + shared) * rows + hidden * active + threads_heads;
        const size_t lists = (sizeof(Segment) + sizeof(int) + sizeof(HeadCache) * m_.kv_heads) * cache_.sequences;
        float *next = static_cast<float *>(context_->decoder.take(sizeof(float) * (floats + 16) + lists));
        if (next == nullptr) return false;
        auto take = [&next](int64_t count) { return next += count, next - count; };
        x_ = take(hidden * rows);
        normed_ = take(hidden * rows);
        y_ = take(hidden * rows);
        last_ = take(hidden * active);
        head_ = take(threads_heads);
        gate_ = next;
        up_ = gate_ + int64_t{m_.intermediate} * rows;
        float *end = next + shared * rows;
        q_ = take(int64_t{queries_} * rows);
        k_ = take(int64_t{keys_} * rows);
        v_ = take(int64_t{keys_} * rows);
        attended_ = take(int64_t{queries_} * rows);
        packed_ = take(packed * rows);
        uintptr_t address = reinterpret_cast<uintptr_t>(end);
        address = (address + alignof(HeadCache) - 1) / alignof(HeadCache) * alignof(HeadCache);
        caches_ = reinterpret_cast<HeadCache *>(address);
        segment_ = reinterpret_cast<Segment *>(caches_ + int64_t{cache_.sequences} * m_.kv_heads);
        sequence_ = reinterpret_cast<int *>(segment_ + cache_.sequences);
        return true;
    }

    // f(row, thread) for all rows of the chunk; `floats` is about how many it works on.
    template <typename F>
    void each_row(int64_t floats, F f) {
        spread(context_->pool, (rows_ + rows_a_job - 1) / rows_a_job, rows_ * floats / floats_a_ns,
               [&](int job, int thread) {
                   const int end = (job + 1) * rows_a_job < rows_ ? (job + 1) * rows_a_job : rows_;
                   for (int row = job * rows_a_job; row < end; row++) f(row, thread);
               });
    }

    int chunk(const int32_t *tokens) {
        const bt_layer *layers = m_.layer;
        const int64_t row_bytes = int64_t{m_.hidden} * (m_.embedding->type == BT_F32 ? 4 : 2);
        each_row(2 * m_.hidden, [&](int row, int) {
            float *x = x_ + int64_t{row} * m_.hidden;
            const char *from = static_cast<const char *>(m_.embedding->codes) + tokens[row] * row_bytes;
            ops_.embed(m_.embedding->type, from, m_.embedding_scale, m_.hidden, x);
            ops_.rms_norm(x, layers[0].attention_norm, m_.epsilon, m_.hidden, normed_ + int64_t{row} * m_.hidden);
        });
        for (int i = 0; i < m_.layers; i++) {
            const bt_layer &layer = layers[i];
            if (const int status = attend(layer, i)) return status;
            add_and_norm(layer.o.bias, layer.attention_out_norm, layer.mlp_norm);
            if (const int status = mlp(layer)) return status;
            const float *next = i + 1 < m_.layers ? layers[i + 1].attention_norm : m_.norm;
            add_and_norm(layer.down.bias, layer.mlp_out_norm, next);
        }
        return 0;
    }

    int attend(const bt_layer &layer, int index) {
        const Output qkv[] = {
            {layer.q.matrix, q_, queries_}, {layer.k.matrix, k_, keys_}, {layer.v.matrix, v_, keys_}};
        if (const int status = linear(context_, qkv, 3, m_.activations, rows_, normed_, m_.hidden)) return status;
        for (int s = 0; s < segments_; s++) {
            for (int h = 0; h < m_.kv_heads; h++) caches_[s * m_.kv_heads + h] = head_cache(index, sequence_[s], h);
        }
        each_row(4 * (queries_ + 4 * keys_),
                 [&](int row, int thread) { place(layer, row, head_ + int64_t{thread} * width_); });
        Attention a = {};
        a.heads = m_.heads;
        a.kv_heads = m_.kv_heads;
        a.size = m_.head_dim;
        a.width = width_;
        a.window = layer.window;
        a.cap = m_.attention_cap;
        a.queries = packed_;
        a.rows = rows_;
        a.segments = segment_;
        a.count = segments_;
        a.caches = caches_;
        a.token_stride = queries_;
        a.head_stride = m_.head_dim;
        if (const int status = attention(context_, a)) return status;
        const Output out = {layer.o.matrix, y_, m_.hidden};
        return linear(context_, &out, 1, m_.activations, rows_, attended_, queries_);
    }

    HeadCache head_cache(int layer, int sequence, int head) const {
        const int64_t positions = (int64_t{sequence} * m_.kv_heads + head) * cache_.capacity;
        const int64_t bytes = positions * width_ * (cache_.type == BT_F32 ? 4 : cache_.type == BT_BF16 ? 2 : 1);
        const bool scaled = cache_.type == BT_I8;
        return {cache_.type,
                static_cast<char *>(cache_.keys[layer]) + bytes,
                static_cast<char *>(cache_.values[layer]) + bytes,
                scaled ? cache_.key_scales[layer] + positions : nullptr,
                scaled ? cache_.value_scales[layer] + positions : nullptr,
                0,
                0,
                0};
    }

    // A row's query to where attention takes it, its key and value into the cache.
    void place(const bt_layer &layer, int row, float *room) {
        int s = 0;
        while (row >= segment_[s].row + segment_[s].tokens) s++;
        const int position = segment_[s].position + row - segment_[s].row;
        Head head = {};
        head.size = m_.head_dim;
        head.width = width_;
        head.epsilon = m_.epsilon;
        if (layer.rope >= 0) {
            const bt_rope &rope = ropes_[layer.rope];
            head.rotary = rope.rotary;
            head.cos = rope.cos + int64_t{position - rope.first} * rope.stride;
            head.sin = rope.sin + int64_t{position - rope.first} * rope.stride;
        }
        const Head plain = {nullptr, nullptr, nullptr, nullptr, m_.head_dim, width_, 0, 0, 1.0f};
        head.norm = layer.q_norm;
        head.scale = m_.attention_scale;
        for (int h = 0; h < m_.heads; h++) {
            const int64_t to = (int64_t{h / repeat_} * rows_ + row) * repeat_ + h % repeat_;
            head.bias = layer.q.bias == nullptr ? nullptr : layer.q.bias + h * m_.head_dim;
            ops_.head(head, q_ + int64_t{row} * queries_ + h * m_.head_dim, packed_ + to * width_);
        }
        head.norm = layer.k_norm;
        head.scale = 1;
        for (int h = 0; h < m_.kv_heads; h++) {
            head.bias = layer.k.bias == nullptr ? nullptr : layer.k.bias + h * m_.head_dim;
            ops_.head(head, k_ + int64_t{row} * keys_ + h * m_.head_dim, room);
            append(caches_[s * m_.kv_heads + h], position, true, room);
            Head value = plain;
            value.bias = layer.v.bias == nullptr ? nullptr : layer.v.bias + h * m_.head_dim;
            ops_.head(value, v_ + int64_t{row} * keys_ + h * m_.head_dim, room);
            append(caches_[s * m_.kv_heads + h], position, false, room);
        }
    }

    void append(const HeadCache &cache, int position, bool key, const float *from) const {
        const int64_t element = cache.type == BT_F32 ? 4 : cache.type == BT_BF16 ? 2 : 1;
        const int64_t at = key ? int64_t{position / panel_keys} * panel_keys * width_ + position % panel_keys
                               : int64_t{position} * width_;
        const void *base = key ? cache.keys : cache.values;
        const float *scales = key ? cache.key_scales : cache.value_scales;
        ops_.append(cache.type, from, width_, key ? panel_keys : 1,
                    const_cast<char *>(static_cast<const char *>(base)) + at * element,
                    scales == nullptr ? nullptr : const_cast<float *>(scales) + position);
    }

    int mlp(const bt_layer &layer) {
        const Output outputs[] = {{layer.gate.matrix, gate_, m_.intermediate}, {layer.up.matrix, up_, m_.intermediate}};
        if (const int status = linear(context_, outputs, 2, m_.activations, rows_, normed_, m_.hidden)) return status;
        each_row(8 * int64_t{m_.intermediate}, [&](int row, int) {
            float *gate = gate_ + int64_t{row} * m_.intermediate, *up = up_ + int64_t{row} * m_.intermediate;
            if (layer.gate.bias != nullptr) ops_.add(layer.gate.bias, m_.intermediate, gate);
            if (layer.up.bias != nullptr) ops_.add(layer.up.bias, m_.intermediate, up);
            ops_.gate(m_.activation, up, m_.intermediate, gate);
        });
        const Output out = {layer.down.matrix, y_, m_.hidden};
        return linear(context_, &out, 1, m_.activations, rows_, gate_, m_.intermediate);
    }

    // x += what a half of the block computed; the other half's input from it.
    void add_and_norm(const float *bias, const float *out_norm, const float *next_norm) {
        each_row(3 * m_.hidden, [&](int row, int) {
            const int64_t at = int64_t{row} * m_.hidden;
            if (bias != nullptr) ops_.add(bias, m_.hidden, y_ + at);
            if (out_norm != nullptr) ops_.rms_norm(y_ + at, out_norm, m_.epsilon, m_.hidden, y_ + at);
            ops_.add(y_ + at, m_.hidden, x_ + at);
            ops_.rms_norm(x_ + at, next_norm, m_.epsilon, m_.hidden, normed_ + at);
        });
    }

    bt_context *context_;
    const VectorOps &ops_;
    const bt_decoder &m_;
    const bt_cache &cache_;
    const bt_rope *ropes_;
    int repeat_, width_, queries_, keys_;
    int rows_ = 0, segments_ = 0;
    float *x_, *normed_, *y_, *last_, *head_, *gate_, *up_, *q_, *k_, *v_, *packed_, *attended_;
    HeadCache *caches_;
    Segment *segment_;
    int *sequence_;
};

bool fits(const bt_projection &p, int out_features, int in_features) {
    return p.matrix != nullptr && valid(*p.matrix) && p.matrix->out_features == out_features &&
           p.matrix->in_features == in_features;
}

bool valid_decoder(const bt_decoder &m) {
    if (m.layers < 1 || m.kv_heads < 1 || m.heads < 1 || m.heads % m.kv_heads != 0 || m.head_dim < 1) return false;
    const int queries = m.heads * m.head_dim, keys = m.kv_heads * m.head_dim;
    for (int i = 0; i < m.layers; i++) {
        const bt_layer &l = m.layer[i];
        if (!fits(l.q, queries, m.hidden) || !fits(l.k, keys, m.hidden) || !fits(l.v, keys, m.hidden) ||
            !fits(l.o, m.hidden, queries) || !fits(l.gate, m.intermediate, m.hidden) ||
            !fits(l.up, m.intermediate, m.hidden) || !fits(l.down, m.hidden, m.intermediate)) {
            return false;
        }
    }
    return fits({m.head, nullptr}, m.vocabulary, m.hidden) && fits({m.embedding, nullptr}, m.vocabulary, m.hidden) &&
           m.embedding->type != BT_CODES && (m.activation == BT_SILU || m.activation == BT_GELU_TANH);
}

// Tokens, positions and rotary tables lie where they are read.
bool valid_call(const bt_decoder &m, const bt_cache &cache, const bt_rope *ropes, const int32_t *tokens,
                const int32_t *counts, const int32_t *lengths) {
    if (cache.type != BT_F32 && cache.type != BT_BF16 && cache.type != BT_I8) return false;
    if (cache.sequences < 1 || cache.capacity < 1 || cache.capacity % block_keys != 0) return false;
    int64_t total = 0;
    int first = INT32_MAX, end = 0;  // positions of new tokens
    for (int s = 0; s < cache.sequences; s++) {
        if (counts[s] < 0 || lengths[s] < 0 || counts[s] > cache.capacity - lengths[s]) return false;
        total += counts[s];
        if (counts[s] == 0) continue;
        first = lengths[s] < first ? lengths[s] : first;
        end = lengths[s] + counts[s] > end ? lengths[s] + counts[s] : end;
    }
    for (int64_t i = 0; i < total; i++) {
        if (tokens[i] < 0 || tokens[i] >= m.vocabulary) return false;
    }
    for (int i = 0; i < m.layers; i++) {
        if (m.layer[i].rope < 0) continue;
        const bt_rope &rope = ropes[m.layer[i].rope];
        if (rope.first > first || rope.end < end || rope.rotary > m.head_dim || rope.rotary % 2 != 0) return false;
    }
    return total < INT32_MAX;
}

}  // namespace

}  // namespace bittern

extern "C" int bt_forward(bt_context *c, const bt_decoder *m, const bt_cache *cache, const bt_rope *ropes,
                          const int32_t *tokens, const int32_t *counts, const int32_t *lengths, float *logits) {
    using namespace bittern;
    if (c == nullptr || m == nullptr || cache == nullptr || !valid_decoder(*m) ||
        !valid_call(*m, *cache, ropes, tokens, counts, lengths)) {
        return BT_BAD_ARGUMENT;
    }
    Lock lock(c);
    return Forward(c, *m, *cache, ropes).run(tokens, counts, lengths, logits);
}
