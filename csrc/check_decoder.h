// The decoder's part of the check program: attention against double precision; a small decoder against itself, with
// other threads and with its tokens in other portions.
#ifndef BITTERN_CHECK_DECODER_H
#define BITTERN_CHECK_DECODER_H

#include <cmath>
#include <cstring>

#include "check.h"

namespace {

void check_attention_case(bt_context *c, int heads, int kv_heads, int queries, int keys, int head_dim, int kind,
                          const char *what) {
    bt_attention_call call = {};
    call.batch = 2, call.heads = heads, call.kv_heads = kv_heads, call.queries = queries, call.keys = keys;
    call.head_dim = head_dim, call.scale = 0.3f;
    call.window = kind == 1 ? keys / 2 + 1 : 0;
    call.cap = kind == 2 ? 1.5f : 0;
    Buffer<float> slopes = make<float>(heads);
    for (int h = 0; h < heads; h++) slopes[h] = 0.1f * static_cast<float>(h + 1);
    call.slopes = kind == 3 ? slopes.get() : nullptr;
    // Heads side by side at each position, as a projection leaves them.
    const int64_t sizes[3] = {2ll * queries * heads * head_dim, 2ll * keys * kv_heads * head_dim,
                              2ll * keys * kv_heads * head_dim};
    Buffer<float> q = make<float>(sizes[0]), k = make<float>(sizes[1]), v = make<float>(sizes[2]);
    Buffer<float> out = make<float>(sizes[0]);
    for (int64_t i = 0; i < sizes[0]; i++) q[i] = random_float();
    for (int64_t i = 0; i < sizes[1]; i++) k[i] = random_float(), v[i] = random_float();
    const ptrdiff_t wide[3] = {static_cast<ptrdiff_t>(queries) * heads * head_dim, head_dim, heads * head_dim};
    const ptrdiff_t narrow[3] = {static_cast<ptrdiff_t>(keys) * kv_heads * head_dim, head_dim, kv_heads * head_dim};
    memcpy(call.q_strides, wide, sizeof wide), memcpy(call.out_strides, wide, sizeof wide);
    memcpy(call.k_strides, narrow, sizeof narrow), memcpy(call.v_strides, narrow, sizeof narrow);
    call.q = q.get(), call.k = k.get(), call.v = v.get(), call.out = out.get();
    const int status = bt_attention(c, &call);
    expect(status == 0, "%s: bt_attention gives %d", what, status);
    Buffer<double> weights = make<double>(keys);
    for (int index = 0; index < 2 * queries * heads; index++) {
        const int batch = index / (queries * heads), query = index / heads % queries, head = index % heads;
        const int position = keys - queries + query;
        const int first = call.window > 0 && position >= call.window ? position - call.window + 1 : 0;
        const int64_t base = batch * narrow[0] + head / (heads / kv_heads) * head_dim;
        double sum = 0;
        for (int key = first; key <= position; key++) {
            double score = 0;
            for (int i = 0; i < head_dim; i++) {
                score += static_cast<double>(q[index * head_dim + i]) * k[base + key * narrow[2] + i];
            }
            score *= call.scale;
            if (call.cap > 0) score = call.cap * tanh(score / call.cap);
            if (call.slopes != nullptr) score += static_cast<double>(slopes[head]) * (key - position);
            sum += weights[key] = exp(score);
        }
        for (int i = 0; i < head_dim; i++) {
            double exact = 0;
            for (int key = first; key <= position; key++) exact += weights[key] / sum * v[base + key * narrow[2] + i];
            const double found = out[index * head_dim + i];
            // Values lie within 1, scores within 20: fp32 rounds a weight by less than 2e-6 of itself.
            expect(fabs(found - exact) < 1e-5, "%s: attention %d of %d queries, %d keys, kind %d: %g is not %g", what,
                   query, queries, keys, kind, found, exact);
        }
    }
}

void check_attention(bt_context *c, const char *what) {
    for (int kind = 0; kind < 4; kind++) {
        check_attention_case(c, 4, 2, 1, 1, 16, kind, what);
        check_attention_case(c, 6, 2, 1, 77, 20, kind, what);
        check_attention_case(c, 3, 3, 19, 19, 64, kind, what);
        check_attention_case(c, 8, 1, 5, 130, 8, kind, what);
    }
}

// Random weights of a small decoder.
struct SmallDecoder {
    static constexpr int layers = 2, hidden = 48, heads = 4, kv_heads = 2, head_dim = 24, intermediate = 80;
    static constexpr int vocabulary = 50, positions = 64, most_matrices = 7 * layers + 2;
    bt_decoder decoder = {};
    bt_layer layer[layers] = {};
    bt_rope rope = {};
    bt_matrix matrices[most_matrices] = {};
    Buffer<uint8_t> codes[most_matrices];
    Buffer<float> scales[most_matrices];
    Buffer<uint16_t> head;
    Buffer<float> embedding, ones, bias, cos, sin;
    int count = 0;

    bt_projection packed(bt_context *c, int out_features, int in_features) {
        bt_matrix &m = matrices[count];
        const int bits = count % 4 == 0 ? 8 : 2 + count % 3, group = count % 2 == 0 ? 16 : in_features;
        m.out_features = out_features, m.in_features = in_features, m.type = BT_CODES, m.bits = bits;
        m.group_size = group, m.scale_type = BT_F32;
        Buffer<uint8_t> raw = make<uint8_t>(out_features * in_features);
        for (int i = 0; i < out_features * in_features; i++) raw[i] = static_cast<uint8_t>(random_below(1 << bits));
        codes[count] = make<uint8_t>(bt_packed_bytes(out_features, in_features, bits, group));
        expect(bt_pack(c, out_features, in_features, bits, group, raw.get(), in_features, 1, codes[count].get()) == 0,
               "bt_pack");
        const int scale_count = (out_features + 15) / 16 * 16 * ((in_features + group - 1) / group);
        scales[count] = make<float>(scale_count);
        for (int i = 0; i < scale_count; i++) scales[count][i] = random_float() * 0.3f / static_cast<float>(1 << bits);
        m.codes = codes[count].get(), m.scales = scales[count].get();
        count++;
        return {&m, count % 3 == 0 ? bias.get() : nullptr};
    }

    explicit SmallDecoder(bt_context *c) {
        ones = make<float>(hidden), bias = make<float>(intermediate);
        for (int i = 0; i < hidden; i++) ones[i] = 1;
        for (int i = 0; i < intermediate; i++) bias[i] = 0.1f * random_float();
        for (bt_layer &l : layer) {
            l.q = packed(c, heads * head_dim, hidden), l.k = packed(c, kv_heads * head_dim, hidden);
            l.v = packed(c, kv_heads * head_dim, hidden), l.o = packed(c, hidden, heads * head_dim);
            l.gate = packed(c, intermediate, hidden), l.up = packed(c, intermediate, hidden);
            l.down = packed(c, hidden, intermediate);
            l.attention_norm = l.mlp_norm = ones.get();
        }
        layer[1].q_norm = layer[1].k_norm = ones.get(), layer[1].window = 7;
        layer[1].attention_out_norm = layer[1].mlp_out_norm = ones.get();
        embedding = make<float>(vocabulary * hidden), head = make<uint16_t>(vocabulary * hidden);
        for (int i = 0; i < vocabulary * hidden; i++) {
            embedding[i] = random_float();
            head[i] = static_cast<uint16_t>(random_below(2) << 15 | (122 << 7) | random_below(128));
        }
        bt_matrix &first = matrices[count++], &last = matrices[count++];
        first.out_features = last.out_features = vocabulary, first.in_features = last.in_features = hidden;
        first.type = BT_F32, first.codes = embedding.get();
        last.type = BT_BF16, last.codes = head.get();
        cos = make<float>(positions * head_dim / 2), sin = make<float>(positions * head_dim / 2);
        for (int i = 0; i < positions * head_dim / 2; i++) {
            const double angle = i / (head_dim / 2) * pow(100.0, -2.0 * (i % (head_dim / 2)) / head_dim);
            cos[i] = static_cast<float>(::cos(angle)), sin[i] = static_cast<float>(::sin(angle));
        }
        rope = {cos.get(), sin.get(), 0, positions, head_dim / 2, head_dim};
        decoder.layers = layers, decoder.hidden = hidden, decoder.heads = heads, decoder.kv_heads = kv_heads;
        decoder.head_dim = head_dim, decoder.intermediate = intermediate, decoder.vocabulary = vocabulary;
        decoder.activation = BT_SILU, decoder.epsilon = 1e-5f, decoder.embedding_scale = 1;
        decoder.attention_scale = 0.2f, decoder.embedding = &first, decoder.head = &last;
        decoder.norm = ones.get(), decoder.layer = layer;
    }
};

// The logits after 12 tokens of sequence 0 and 9 of sequence 2, given in portions; sequence 1 stays empty.
Buffer<float> decode(bt_context *c, const SmallDecoder &d, int type, const int (*portions)[3], int calls) {
    constexpr int sequences = 3, capacity = 64, columns = 32;
    const int64_t elements = static_cast<int64_t>(sequences) * d.kv_heads * capacity * columns;
    const int bytes = type == BT_F32 ? 4 : type == BT_BF16 ? 2 : 1;
    Buffer<Buffer<uint8_t>> memory = make<Buffer<uint8_t>>(2 * d.layers);
    Buffer<Buffer<float>> scales = make<Buffer<float>>(2 * d.layers);
    void *keys[d.layers], *values[d.layers];
    float *key_scales[d.layers], *value_scales[d.layers];
    for (int i = 0; i < 2 * d.layers; i++) {
        memory[i] = make<uint8_t>(elements * bytes);
        scales[i] = make<float>(elements / columns);
    }
    for (int i = 0; i < d.layers; i++) {
        keys[i] = memory[2 * i].get(), values[i] = memory[2 * i + 1].get();
        key_scales[i] = scales[2 * i].get(), value_scales[i] = scales[2 * i + 1].get();
    }
    const bool with_scales = type == BT_I8;
    const bt_cache cache = {type, sequences, capacity, keys, values, with_scales ? key_scales : nullptr,
                            with_scales ? value_scales : nullptr};
    int32_t lengths[sequences] = {};
    Buffer<float> logits;
    for (int i = 0; i < calls; i++) {
        int total = 0, some = 0;
        for (int s = 0; s < sequences; s++) total += portions[i][s], some += portions[i][s] > 0;
        Buffer<int32_t> tokens = make<int32_t>(total);
        for (int s = 0, t = 0; s < sequences; s++) {
            for (int j = 0; j < portions[i][s]; j++) tokens[t++] = (7 * s + 3 * (lengths[s] + j)) % d.vocabulary;
        }
        logits = make<float>(some * d.vocabulary);
        const int32_t counts[sequences] = {portions[i][0], portions[i][1], portions[i][2]};
        const int status = bt_forward(c, &d.decoder, &cache, &d.rope, tokens.get(), counts, lengths, logits.get());
        expect(status == 0, "bt_forward gives %d", status);
        for (int s = 0; s < sequences; s++) lengths[s] += counts[s];
    }
    return logits;
}

void check_decoder(bt_context *const *contexts, int count, int activations, int type, const char *what) {
    static const int whole[][3] = {{12, 0, 9}}, steps[][3] = {{5, 0, 3}, {5, 0, 4}, {1, 0, 1}, {1, 0, 1}};
    SmallDecoder d(contexts[0]);
    d.decoder.activations = activations;
    const Buffer<float> at_once = decode(contexts[0], d, type, whole, 1);
    const Buffer<float> expected = decode(contexts[0], d, type, steps, 4);
    for (int i = 0; i < count; i++) {
        const Buffer<float> found = decode(contexts[i], d, type, steps, 4);
        expect(memcmp(found.get(), expected.get(), sizeof(float) * 2 * d.vocabulary) == 0,
               "%s: logits depend on the number of threads, cache type %d", what, type);
    }
    double difference = 0, size = 0;
    for (int i = 0; i < 2 * d.vocabulary; i++) {
        difference += pow(at_once[i] - expected[i], 2), size += pow(expected[i], 2);
    }
    // Portions change the order of sums alone; with 8-bit inputs a sum's last bit may turn a digit.
    const double allowed = activations == BT_A16 && type == BT_F32 ? 1e-3 : 0.1;
    expect(size > 0 && sqrt(difference / size) < allowed, "%s: logits depend on portions by %g, cache type %d", what,
           sqrt(difference / size), type);
}

}  // namespace

#endif
