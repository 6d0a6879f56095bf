// Attention cut into jobs: tiles of rows where there are many of them, pieces of keys where there are few.
#include "attention.h"

namespace bittern {

namespace {

constexpr int tile_rows_wanted = 48;
constexpr int multiplications_a_ns = 32;
constexpr int floats_merged_a_ns = 8;

// Some tokens of a segment and all or one of the pieces of keys that they see, for one head of keys.
struct Task {
    int segment, token, tokens;
    int piece, pieces;
    int slot;  // of the state that this piece leaves for finishing; -1 when the task finishes itself
};

// How a segment is cut.
struct Cut {
    int tile_tokens, tiles;
    int first_piece, pieces;  // those that any of its tokens sees
    bool by_piece;
    int tasks() const { return by_piece ? pieces : tiles; }
};

int first_piece_of(int position, int window) {
    const int key = window > 0 ? position - window + 1 : 0;
    return key > 0 ? key / piece_keys : 0;
}

Cut cut(const Attention &a, const Segment &s) {
    const int repeat = a.heads / a.kv_heads;
    Cut c;
    c.tile_tokens = tile_rows_wanted / repeat > 1 ? tile_rows_wanted / repeat : 1;
    c.tiles = (s.tokens + c.tile_tokens - 1) / c.tile_tokens;
    c.first_piece = first_piece_of(s.position, a.window);
    c.pieces = (s.position + s.tokens - 1) / piece_keys + 1 - c.first_piece;
    c.by_piece = c.tiles == 1 && c.pieces > 1;
    return c;
}

class Stage {
   public:
    Stage(bt_context *c, const Attention &a) : context_(c), a_(a), repeat_(a.heads / a.kv_heads) {
        stride_ = a.width + state_extra;
        tile_rows_ = repeat_ > tile_rows_wanted ? repeat_ : tile_rows_wanted / repeat_ * repeat_;
        thread_floats_ = 2 * static_cast<int64_t>(tile_rows_) * stride_ + flash_scratch(tile_rows_, a.width);
        for (int s = 0; s < a.count; s++) {
            const Cut made = cut(a, a.segments[s]);
            tasks_ += made.tasks();
            if (made.by_piece) {
                slots_ += made.pieces;
                const int rows = a.segments[s].tokens * repeat_;
                slot_rows_ = rows > slot_rows_ ? rows : slot_rows_;
            }
            const int64_t keys = static_cast<int64_t>(made.pieces) * piece_keys;
            const int64_t seen = a.segments[s].position + a.segments[s].tokens;
            work_ += a.segments[s].tokens * (seen < keys ? seen : keys);
        }
        work_ *= 2 * static_cast<int64_t>(a.heads) * a.width / multiplications_a_ns;
    }

    int run() {
        const int64_t states = static_cast<int64_t>(slots_) * a_.kv_heads * slot_rows_ * stride_;
        const size_t floats = static_cast<size_t>(states + thread_floats_ * context_->pool.threads());
        states_ = static_cast<float *>(context_->attention.take(floats * sizeof(float) + sizeof(Task) * tasks_));
        if (states_ == nullptr) return BT_NO_MEMORY;
        scratch_ = states_ + states;
        list_ = reinterpret_cast<Task *>(states_ + floats);
        fill();
        spread(context_->pool, tasks_ * a_.kv_heads, work_, [this](int job, int thread) {
            // Late tiles see more keys: they come first, so that the last job is a small one.
            attend(list_[tasks_ - 1 - job / a_.kv_heads], job % a_.kv_heads, scratch_ + thread * thread_floats_);
        });
        if (slots_ > 0) {
            spread(context_->pool, a_.count * a_.kv_heads, states / floats_merged_a_ns,
                   [this](int job, int) { join(job / a_.kv_heads, job % a_.kv_heads); });
        }
        return 0;
    }

   private:
    void fill() {
        Task *next = list_;
        int slot = 0;
        for (int s = 0; s < a_.count; s++) {
            const Segment &segment = a_.segments[s];
            const Cut made = cut(a_, segment);
            for (int i = 0; i < made.tasks(); i++, next++) {
                if (made.by_piece) {
                    *next = {s, 0, segment.tokens, made.first_piece + i, 1, slot++};
                    continue;
                }
                const int token = i * made.tile_tokens, left = segment.tokens - token;
                const int tokens = left < made.tile_tokens ? left : made.tile_tokens;
                const int first = first_piece_of(segment.position + token, a_.window);
                const int pieces = (segment.position + token + tokens - 1) / piece_keys + 1 - first;
                *next = {s, token, tokens, first, pieces, -1};
            }
        }
    }

    float *slot(int index, int head) const {
        return states_ + (static_cast<int64_t>(index) * a_.kv_heads + head) * slot_rows_ * stride_;
    }

    void attend(const Task &task, int head, float *scratch) const {
        const Segment &segment = a_.segments[task.segment];
        const VectorOps &ops = *context_->kernels->ops;
        Queries q;
        q.count = task.tokens * repeat_;
        q.width = a_.width;
        q.repeat = repeat_;
        q.rows = a_.queries + (static_cast<int64_t>(head) * a_.rows + segment.row + task.token) * repeat_ * a_.width;
        q.slopes = a_.slopes == nullptr ? nullptr : a_.slopes + head * repeat_;
        q.position = segment.position + task.token;
        q.window = a_.window;
        q.cap = a_.cap;
        const HeadCache &cache = a_.caches[task.segment * a_.kv_heads + head];
        float *total = task.slot < 0 ? scratch : slot(task.slot, head);
        float *later = scratch + tile_rows_ * stride_, *room = later + tile_rows_ * stride_;
        for (int i = 0; i < task.pieces; i++) {
            const int begin = (task.piece + i) * piece_keys;
            ops.attend(q, cache, begin, begin + piece_keys, i == 0 ? total : later, room);
            if (i > 0) ops.merge(later, q.count, a_.width, total);
        }
        if (task.slot < 0) finish(segment, task.token, task.tokens, head, total);
    }

    void finish(const Segment &segment, int token, int tokens, int head, const float *state) const {
        for (int row = 0; row < tokens * repeat_; row++) {
            context_->kernels->ops->finish(state + row * stride_, a_.size, a_.width,
                                           segment.out + (token + row / repeat_) * a_.token_stride +
                                               (head * repeat_ + row % repeat_) * a_.head_stride);
        }
    }

    // The pieces of a segment, in their order.
    void join(int segment, int head) const {
        float *total = nullptr;
        const int tokens = a_.segments[segment].tokens;
        for (int i = 0; i < tasks_; i++) {
            if (list_[i].segment != segment || list_[i].slot < 0) continue;
            float *state = slot(list_[i].slot, head);
            if (total == nullptr) {
                total = state;
            } else {
                context_->kernels->ops->merge(state, tokens * repeat_, a_.width, total);
            }
        }
        if (total != nullptr) finish(a_.segments[segment], 0, tokens, head, total);
    }

    bt_context *context_;
    const Attention &a_;
    const int repeat_;
    int stride_, tile_rows_, tasks_ = 0;
    int slots_ = 0, slot_rows_ = 0;  // states of pieces, and the most rows of one
    int64_t thread_floats_, work_ = 0;
    float *states_ = nullptr, *scratch_ = nullptr;
    Task *list_ = nullptr;
};

}  // namespace

int attention(bt_context *c, const Attention &a) { return Stage(c, a).run(); }

}  // namespace bittern

using namespace bittern;

extern "C" int bt_attention(bt_context *c, const bt_attention_call *call) {
    if (c == nullptr || call == nullptr || call->batch < 1 || call->queries < 1 || call->kv_heads < 1 ||
        call->head_dim < 1 || call->heads % call->kv_heads != 0 || call->keys < call->queries) {
        return BT_BAD_ARGUMENT;
    }
    Lock lock(c);
    Attention a = {};
    a.heads = call->heads;
    a.kv_heads = call->kv_heads;
    a.size = call->head_dim;
    a.width = round_up(call->head_dim, head_quantum);
    a.window = call->window;
    a.cap = call->cap;
    a.slopes = call->slopes;
    a.rows = call->batch * call->queries;
    a.count = call->batch;
    a.token_stride = call->out_strides[2];
    a.head_stride = call->out_strides[1];
    const int repeat = a.heads / a.kv_heads;
    const int64_t packed = static_cast<int64_t>(a.rows) * a.heads * a.width;
    const size_t bytes = sizeof(float) * packed + (sizeof(Segment) + sizeof(HeadCache) * a.kv_heads) * a.count;
    float *queries = static_cast<float *>(c->decoder.take(bytes));
    if (queries == nullptr) return BT_NO_MEMORY;
    HeadCache *caches = reinterpret_cast<HeadCache *>(queries + packed);
    Segment *segments = reinterpret_cast<Segment *>(caches + a.count * a.kv_heads);
    for (int s = 0; s < a.count; s++) {
        float *out = call->out + s * call->out_strides[0];
        segments[s] = {s * call->queries, call->queries, call->keys - call->queries, out};
        for (int h = 0; h < a.kv_heads; h++) {
            caches[s * a.kv_heads + h] = {BT_F32,
                                          call->k + s * call->k_strides[0] + h * call->k_strides[1],
                                          call->v + s * call->v_strides[0] + h * call->v_strides[1],
                                          nullptr,
                                          nullptr,
                                          call->k_strides[2],
                                          call->v_strides[2],
                                          a.size};
        }
    }
    c->pool.run(a.rows, [&](int row, int) {
        Head head = {};
        head.size = a.size;
        head.width = a.width;
        head.scale = call->scale;
        for (int h = 0; h < a.heads; h++) {
            const float *from = call->q + row / call->queries * call->q_strides[0] + h * call->q_strides[1] +
                                row % call->queries * call->q_strides[2];
            const int64_t to = (static_cast<int64_t>(h / repeat) * a.rows + row) * repeat + h % repeat;
            c->kernels->ops->head(head, from, queries + to * a.width);
        }
    });
    a.queries = queries;
    a.segments = segments;
    a.caches = caches;
    return attention(c, a);
}
