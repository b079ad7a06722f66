// SPDX-License-Identifier: MIT
//
// Compares what decoding takes of ggml's CPU backend with double precision: the dot product of Q8_0 rows, MUL_MAT with
// one column for each matrix, MUL_MAT_ID of one token, and FLASH_ATTN_EXT.
//
//   decode_check SEED ROUNDS         the listed cases, then that many random ones; exit 1 where one is out of bounds
//   decode_check bits SEED ROUNDS    the same cases, but print a hash of the results alone, right or wrong
//   decode_check time CASE THREADS   the seconds of one attention; CASE is TYPE,DK,DV,HEADS,KV_HEADS,TOKENS,LENGTH[,mla]

#include "kernel_reference.h"

#include <algorithm>

using namespace reference;

static long cases = 0;

static void check_dot(numbers & random, kind kx, kind ky, int64_t blocks) {
    cases++;
    std::vector<block> x(blocks);
    std::vector<block> y(blocks);
    for (int64_t b = 0; b < blocks; b++) {
        fill_block(random, kx, x[b]);
        fill_block(random, ky, y[b]);
    }
    float found = NAN;
    ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->vec_dot(int(blocks * BLOCK), &found, 0, x.data(), 0, y.data(), 0, 1);
    compare(found, dot(x.data(), y.data(), blocks),
            std::string("dot ") + name(kx) + " " + name(ky) + " blocks " + std::to_string(blocks));
}

static ggml_tensor * make_weights(graph & g, numbers & random, kind k, int64_t n, int64_t padding, int64_t rows,
                                  int64_t mats) {
    ggml_tensor * const whole = ggml_new_tensor_3d(g.context, GGML_TYPE_Q8_0, n + padding * BLOCK, rows, mats);
    for (size_t b = 0; b < ggml_nbytes(whole) / sizeof(block); b++) {
        fill_block(random, k, static_cast<block *>(whole->data)[b]);
    }
    return ggml_view_3d(g.context, whole, n, rows, mats, whole->nb[1], whole->nb[2], 0);
}

static const block * weights_row(const ggml_tensor * w, int64_t row, int64_t mat) {
    return reinterpret_cast<const block *>(static_cast<const char *>(w->data) + row * w->nb[1] + mat * w->nb[2]);
}

// one column for each of some matrices, as in the absorbed form of MLA
static void check_columns(numbers & random, kind kw, kind ka, int64_t n, int64_t rows, int64_t mats, int64_t padding,
                          int threads) {
    cases++;
    graph g(size_t((n + padding * BLOCK) * rows * mats * 2 + (n + rows) * mats * 4));
    ggml_tensor * const w = make_weights(g, random, kw, n, padding, rows, mats);
    ggml_tensor * const a = ggml_permute(g.context, ggml_new_tensor_3d(g.context, GGML_TYPE_F32, n, mats, 1), 0, 2, 1, 3);
    for (int64_t m = 0; m < mats; m++) {
        fill_row(random, ka, static_cast<float *>(a->data) + m * n, n);
    }
    ggml_tensor * const result = ggml_mul_mat(g.context, w, a);
    std::fill_n(static_cast<float *>(result->data), ggml_nelements(result), NAN);
    g.compute(result, threads);
    for (int64_t m = 0; m < mats; m++) {
        const std::vector<block> column = quantize(static_cast<const float *>(a->data) + m * n, n);
        for (int64_t r = 0; r < rows; r++) {
            compare(static_cast<const float *>(result->data)[m * rows + r], dot(weights_row(w, r, m), column.data(), n / BLOCK),
                    std::string("columns ") + name(kw) + " " + name(ka) + " n " + std::to_string(n) + " rows " +
                        std::to_string(rows) + " matrices " + std::to_string(mats) + " threads " + std::to_string(threads));
        }
    }
}

// the experts of one token: the same activations for each, as before gate and up, or its own, as before down
static void check_experts(numbers & random, kind kw, kind ka, int64_t n, int64_t rows, int64_t experts, int64_t used,
                          bool own, int threads) {
    cases++;
    graph g(size_t(n * rows * experts * 2 + (n + rows) * used * 4));
    ggml_tensor * const w   = make_weights(g, random, kw, n, 0, rows, experts);
    ggml_tensor * const a   = ggml_new_tensor_3d(g.context, GGML_TYPE_F32, n, own ? used : 1, 1);
    // the ids are the first of a longer row, as they are after a sort
    ggml_tensor * const all = ggml_new_tensor_2d(g.context, GGML_TYPE_I32, experts, 1);
    for (int64_t e = 0; e < experts; e++) {
        static_cast<int32_t *>(all->data)[e] = int32_t(e);
    }
    for (int64_t e = experts - 1; e > 0; e--) {
        std::swap(static_cast<int32_t *>(all->data)[e], static_cast<int32_t *>(all->data)[random.between(0, e)]);
    }
    for (int64_t m = 0; m < a->ne[1]; m++) {
        fill_row(random, ka, static_cast<float *>(a->data) + m * n, n);
    }
    ggml_tensor * const ids    = ggml_view_2d(g.context, all, used, 1, all->nb[1], 0);
    ggml_tensor * const result = ggml_mul_mat_id(g.context, w, a, ids);
    std::fill_n(static_cast<float *>(result->data), ggml_nelements(result), NAN);
    g.compute(result, threads);
    for (int64_t u = 0; u < used; u++) {
        const std::vector<block> column = quantize(static_cast<const float *>(a->data) + (own ? u : 0) * n, n);
        const int64_t            expert = static_cast<const int32_t *>(all->data)[u];
        for (int64_t r = 0; r < rows; r++) {
            compare(static_cast<const float *>(result->data)[u * rows + r], dot(weights_row(w, r, expert), column.data(), n / BLOCK),
                    std::string("experts ") + name(kw) + " " + name(ka) + " n " + std::to_string(n) + " rows " + std::to_string(rows) +
                        " experts " + std::to_string(experts) + " used " + std::to_string(used) + " own " + std::to_string(own) +
                        " threads " + std::to_string(threads));
        }
    }
}

// what a query row may see
enum class view { all, none, causal, random, hidden };

struct attention {
    ggml_type type_k, type_v;
    int64_t   dk, dv;
    int64_t   heads, kv_heads;
    int64_t   tokens, length, batches;
    bool      mla;       // V rows are the first DV elements of the K rows
    view      mask;
    bool      head_mask; // a mask for each head
    float     max_bias, softcap;
    bool      sinks;
    kind      numbers_k, numbers_v;
};

static std::string tell(const attention & a, int threads) {
    static const char * const views[] = { "all", "none", "causal", "random", "hidden" };
    char text[512];
    snprintf(text, sizeof(text),
             "K %s %d %s, V %s %d %s, heads %d/%d, tokens %d, length %d, batches %d, mla %d, mask %s/%d, bias %g, cap %g, "
             "sinks %d, threads %d",
             ggml_type_name(a.type_k), int(a.dk), name(a.numbers_k), ggml_type_name(a.type_v), int(a.dv),
             name(a.numbers_v), int(a.heads), int(a.kv_heads), int(a.tokens), int(a.length), int(a.batches), a.mla,
             views[int(a.mask)], a.head_mask, double(a.max_bias), double(a.softcap), a.sinks, threads);
    return text;
}

// rows as the KV cache holds them, and their exact values
static void fill(numbers & random, kind k, ggml_tensor * t, double size) {
    char * const data = static_cast<char *>(t->data);
    if (t->type == GGML_TYPE_Q8_0) {
        for (size_t b = 0; b < ggml_nbytes(t) / sizeof(block); b++) {
            fill_block(random, k, reinterpret_cast<block *>(data)[b]);
        }
        return;
    }
    for (size_t i = 0; i < ggml_nbytes(t) / sizeof(ggml_fp16_t); i++) {
        const kind here = k == kind::mixed ? kind(random.between(0, KINDS - 2)) : k;
        ggml_fp16_t & x = reinterpret_cast<ggml_fp16_t *>(data)[i];
        switch (here) {
            case kind::zeros:    x = ggml_fp16_t(random.between(0, 1) << 15); break;
            case kind::denormal: x = ggml_fp16_t(random.between(0, 1) << 15 | random.between(1, 1023)); break;
            case kind::largest:  x = ggml_fp16_t(random.between(0, 1) << 15 | 0x7bff); break;
            default:             x = ggml_fp32_to_fp16(float(size * random.unit())); break;
        }
    }
}

static std::vector<double> row_values(const ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3) {
    const char * const row = static_cast<const char *>(t->data) + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3];
    std::vector<double> values(size_t(t->ne[0]));
    for (int64_t i = 0; i < t->ne[0]; i++) {
        if (t->type == GGML_TYPE_F32) {
            values[i] = double(reinterpret_cast<const float *>(row)[i]);
        } else if (t->type == GGML_TYPE_F16) {
            values[i] = double(ggml_fp16_to_fp32(reinterpret_cast<const ggml_fp16_t *>(row)[i]));
        } else {
            const block & b = reinterpret_cast<const block *>(row)[i / BLOCK];
            values[i] = double(ggml_fp16_to_fp32(b.d)) * b.qs[i % BLOCK];
        }
    }
    return values;
}

struct operation {
    ggml_tensor *q, *k, *v, *mask, *sinks, *result;
    float        scale;
};

// the cache as llama.cpp lays it out: a row of all KV heads for each position
static ggml_tensor * make_cache(graph & g, ggml_type type, int64_t d, const attention & a) {
    return ggml_permute(g.context, ggml_new_tensor_4d(g.context, type, d, a.kv_heads, a.length, a.batches), 0, 2, 1, 3);
}

static size_t bytes_of(const attention & a) {
    const int64_t kv    = (a.dk + a.dv) * a.kv_heads * a.length * 2;
    const int64_t rows  = (a.dk + a.dv) * a.heads * a.tokens * 4;
    const int64_t masks = a.length * a.tokens * (a.head_mask ? a.heads : 1) * 2;
    return size_t(kv + rows + masks) * a.batches + (4 << 20);
}

static operation make(graph & g, numbers & random, const attention & a) {
    operation op = {};
    op.q = ggml_permute(g.context, ggml_new_tensor_4d(g.context, GGML_TYPE_F32, a.dk, a.heads, a.tokens, a.batches), 0, 2, 1, 3);
    op.k = make_cache(g, a.type_k, a.dk, a);
    op.v = a.mla ? ggml_view_4d(g.context, op.k, a.dv, op.k->ne[1], op.k->ne[2], op.k->ne[3], op.k->nb[1], op.k->nb[2], op.k->nb[3], 0)
                 : make_cache(g, a.type_v, a.dv, a);
    if (a.mask != view::none) {
        op.mask = ggml_new_tensor_4d(g.context, GGML_TYPE_F16, a.length, a.tokens, a.head_mask ? a.heads : 1, a.batches);
    }
    op.scale  = float(1 / std::sqrt(double(a.dk)));
    // large keys are met with small queries, so that the scores stay where a softmax is not a choice of one
    const double size_q = a.numbers_k == kind::largest || (a.numbers_k == kind::mixed) ? 1e-5 : 1;
    op.result = ggml_flash_attn_ext(g.context, op.q, op.k, op.v, op.mask, op.scale, a.max_bias, a.softcap);
    if (a.sinks) {
        op.sinks = ggml_new_tensor_1d(g.context, GGML_TYPE_F32, a.heads);
        for (int64_t h = 0; h < a.heads; h++) {
            static_cast<float *>(op.sinks->data)[h] = float(4 * random.unit());
        }
        ggml_flash_attn_ext_add_sinks(op.result, op.sinks);
    }
    float * const q = static_cast<float *>(op.q->data);
    for (int64_t i = 0; i < ggml_nelements(op.q); i++) {
        q[i] = float(2 * size_q * random.unit());
    }
    fill(random, a.numbers_k, op.k, 2);
    if (!a.mla) {
        fill(random, a.numbers_v, op.v, 2);
    }
    if (op.mask) {
        ggml_fp16_t * const m = static_cast<ggml_fp16_t *>(op.mask->data);
        for (int64_t i = 0; i < ggml_nelements(op.mask); i++) {
            const int64_t position = i % a.length;
            const int64_t token    = i / a.length % a.tokens;
            const bool seen = a.mask == view::all    ? true
                            : a.mask == view::causal ? position <= a.length - a.tokens + token
                            : a.mask == view::random ? random.between(0, 2) == 0
                                                     : token % 2 == 0 && position == a.length / 2; // hidden: one, or none
            // with ALiBi a mask holds distances
            const double bias = a.max_bias > 0 ? double(position - a.length) / 8 : 0;
            m[i] = seen ? ggml_fp32_to_fp16(float(bias)) : ggml_fp16_t(0xfc00);
        }
    }
    return op;
}

static void check(numbers & random, const attention & a, int threads) {
    cases++;
    graph g(bytes_of(a));
    const operation op = make(g, random, a);
    // what was not written is told from what was
    std::fill_n(static_cast<float *>(op.result->data), ggml_nelements(op.result), NAN);
    g.compute(op.result, threads);

    const uint32_t powers = 1u << int(std::floor(std::log2(double(a.heads))));
    for (int64_t i3 = 0; i3 < a.batches; i3++) {
        for (int64_t h = 0; h < a.heads; h++) {
            const int64_t kv_head = h / (a.heads / a.kv_heads);
            double slope = 1;
            if (a.max_bias > 0) {
                slope = h < int64_t(powers) ? std::pow(std::pow(2.0, -double(a.max_bias) / powers), double(h + 1))
                                            : std::pow(std::pow(2.0, -double(a.max_bias) / 2 / powers), double(2 * (h - powers) + 1));
            }
            std::vector<std::vector<double>> ks;
            std::vector<std::vector<double>> vs;
            for (int64_t i = 0; i < a.length; i++) {
                ks.push_back(row_values(op.k, i, kv_head, i3));
                vs.push_back(row_values(op.v, i, kv_head, i3));
            }
            for (int64_t t = 0; t < a.tokens; t++) {
                const std::vector<double> q = row_values(op.q, t, h, i3);
                std::vector<double> score(size_t(a.length), double(-INFINITY));
                double largest = a.sinks ? double(static_cast<const float *>(op.sinks->data)[h]) : double(-INFINITY);
                double size    = 0; // of the products in a score
                for (int64_t i = 0; i < a.length; i++) {
                    double bias = 0;
                    if (op.mask) {
                        const char * const row = static_cast<const char *>(op.mask->data) + t * op.mask->nb[1] +
                                                 (h % op.mask->ne[2]) * op.mask->nb[2] + i3 % op.mask->ne[3] * op.mask->nb[3];
                        bias = slope * double(ggml_fp16_to_fp32(reinterpret_cast<const ggml_fp16_t *>(row)[i]));
                    }
                    if (bias == double(-INFINITY)) {
                        continue;
                    }
                    double sum   = 0;
                    double terms = 0;
                    for (int64_t d = 0; d < a.dk; d++) {
                        sum += q[d] * ks[i][d];
                        terms += std::fabs(q[d] * ks[i][d]);
                    }
                    sum *= double(op.scale);
                    score[i] = (a.softcap > 0 ? double(a.softcap) * std::tanh(sum / double(a.softcap)) : sum) + bias;
                    largest  = std::max(largest, score[i]);
                    size     = std::max(size, terms * double(op.scale) + std::fabs(bias) + double(a.softcap));
                }
                double total = a.sinks ? std::exp(double(static_cast<const float *>(op.sinks->data)[h]) - largest) : 0;
                std::vector<double> want(size_t(a.dv), 0.0);
                std::vector<double> terms(size_t(a.dv), 0.0);
                for (int64_t i = 0; i < a.length; i++) {
                    const double p = score[i] == double(-INFINITY) ? 0 : std::exp(score[i] - largest);
                    total += p;
                    for (int64_t d = 0; p > 0 && d < a.dv; d++) {
                        want[d] += p * vs[i][d];
                        terms[d] += p * std::fabs(vs[i][d]);
                    }
                }
                // a score is rounded once for each product in the same lane, and the exponential makes of its error a
                // factor; the sums over the length add theirs
                const double factor = std::ldexp(size * (double(a.dk) / 16 + 8) + double(a.length) + 32, -24);
                for (int64_t d = 0; d < a.dv; d++) {
                    const double norm = total == 0 ? 0 : 1 / total;
                    const float found = static_cast<const float *>(op.result->data)[((i3 * a.tokens + t) * a.heads + h) * a.dv + d];
                    compare(found, { want[d] * norm, 2 * factor * terms[d] * norm + 1e-30 }, tell(a, threads));
                }
            }
        }
    }
}

static attention plain(ggml_type type, int64_t dk, int64_t dv, int64_t heads, int64_t kv_heads, int64_t tokens, int64_t length) {
    return { type, type, dk, dv, heads, kv_heads, tokens, length, 1, false, view::causal, false, 0, 0, false, kind::plain, kind::plain };
}

static void listed(numbers & random) {
    for (int kx = 0; kx < KINDS; kx++) {
        for (int ky = 0; ky < KINDS; ky++) {
            for (int64_t blocks = 1; blocks <= 9; blocks++) {
                check_dot(random, kind(kx), kind(ky), blocks);
            }
            check_columns(random, kind(kx), kind(ky), 160, 19, 3, 0, 2);
            check_experts(random, kind(kx), kind(ky), 96, 21, 7, 3, true, 3);
        }
    }
    for (int threads = 1; threads <= 9; threads++) {
        check_columns(random, kind::plain, kind::plain, 2048, 131, 1, 0, threads);
        check_columns(random, kind::plain, kind::plain, 128, 512, 16, 1, threads);
        check_columns(random, kind::plain, kind::plain, 32, 1, 1, 0, threads);
        check_experts(random, kind::plain, kind::plain, 256, 45, 64, 8, false, threads);
        check_experts(random, kind::plain, kind::plain, 256, 45, 64, 8, true, threads);
    }
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        // the absorbed form, with few and with many heads, and lengths around the block of the kernel
        for (int64_t length : { 1, 31, 32, 33, 63, 257, 700 }) {
            for (int threads : { 1, 2, 3, 7 }) {
                attention a = plain(type, 576, 512, 16, 1, 1, length);
                a.mla = true;
                check(random, a, threads);
            }
        }
        attention a = plain(type, 576, 512, 128, 1, 3, 100);
        a.mla = true;
        check(random, a, 2);
        // each number of rows that share a head, and several tiles of them
        for (int64_t group = 1; group <= 9; group++) {
            check(random, plain(type, 64, 96, group * 2, 2, 1, 45), 2);
        }
        check(random, plain(type, 128, 128, 8, 2, 40, 90), 3);
        check(random, plain(type, 64, 64, 4, 4, 70, 70), 2);
        for (view mask : { view::all, view::none, view::causal, view::random, view::hidden }) {
            for (int sinks = 0; sinks < 2; sinks++) {
                a       = plain(type, 64, 64, 6, 2, 5, 77);
                a.mask  = mask;
                a.sinks = sinks;
                check(random, a, 2);
            }
        }
        for (kind k : { kind::zeros, kind::denormal, kind::largest, kind::saturated, kind::mixed }) {
            a = plain(type, 128, 64, 8, 2, 3, 50);
            a.numbers_k = k;
            check(random, a, 2);
            a.numbers_k = kind::plain;
            a.numbers_v = k;
            check(random, a, 2);
        }
        a = plain(type, 64, 64, 12, 4, 6, 65);
        a.max_bias  = 8;
        a.head_mask = true;
        check(random, a, 2);
        a = plain(type, 64, 64, 12, 4, 6, 65);
        a.softcap = 30;
        a.batches = 2;
        check(random, a, 2);
    }
    attention a = plain(GGML_TYPE_Q8_0, 128, 128, 8, 2, 2, 100);
    a.type_v = GGML_TYPE_F16;
    check(random, a, 2);
    std::swap(a.type_k, a.type_v);
    check(random, a, 2);
}

static attention draw(numbers & random) {
    attention a = {};
    a.type_k   = random.between(0, 1) ? GGML_TYPE_F16 : GGML_TYPE_Q8_0;
    a.type_v   = random.between(0, 2) ? a.type_k : random.between(0, 1) ? GGML_TYPE_F16 : GGML_TYPE_Q8_0;
    a.dk       = (a.type_k == GGML_TYPE_F16 ? 16 : 32) * random.between(1, 9);
    a.dv       = (a.type_v == GGML_TYPE_F16 ? 16 : 32) * random.between(1, 9);
    a.kv_heads = random.between(1, 4);
    a.heads    = a.kv_heads * random.between(1, 20);
    a.tokens   = random.between(0, 2) ? random.between(1, 4) : random.between(1, 70);
    a.length   = a.tokens + random.between(0, 300);
    a.batches  = random.between(0, 3) ? 1 : 2;
    a.mla      = a.type_k == a.type_v && a.dv <= a.dk && random.between(0, 1);
    a.mask     = view(random.between(0, 4));
    a.head_mask = a.mask != view::none && random.between(0, 4) == 0;
    a.max_bias  = a.mask != view::none && random.between(0, 3) == 0 ? 8 : 0;
    a.softcap   = random.between(0, 4) ? 0.0f : 30.0f;
    a.sinks     = random.between(0, 3) == 0;
    a.numbers_k = random.between(0, 1) ? kind::plain : kind(random.between(0, KINDS - 1));
    a.numbers_v = a.mla ? a.numbers_k : random.between(0, 1) ? kind::plain : kind(random.between(0, KINDS - 1));
    return a;
}

static int measure(const char * text, int threads) {
    attention a = plain(GGML_TYPE_F16, 0, 0, 0, 0, 0, 0);
    char type[8];
    char mla[8] = "";
    long d[6];
    if (sscanf(text, "%7[^,],%ld,%ld,%ld,%ld,%ld,%ld,%7s", type, d, d + 1, d + 2, d + 3, d + 4, d + 5, mla) < 7) {
        fprintf(stderr, "decode_check: %s is no case\n", text);
        return 2;
    }
    a = plain(strcmp(type, "q8_0") == 0 ? GGML_TYPE_Q8_0 : GGML_TYPE_F16, d[0], d[1], d[2], d[3], d[4], d[5]);
    a.mla = strcmp(mla, "mla") == 0;
    numbers random(1);
    graph g(bytes_of(a) + (1 << 20));
    const operation op = make(g, random, a);
    printf("%.9f\n", g.best_seconds(op.result, threads, 20));
    return 0;
}

int main(int argc, char ** argv) {
    ggml_cpu_init();
    if (argc == 4 && strcmp(argv[1], "time") == 0) {
        return measure(argv[2], atoi(argv[3]));
    }
    const bool bits_alone = argc == 4 && strcmp(argv[1], "bits") == 0;
    if (argc != 3 && !bits_alone) {
        fprintf(stderr, "usage: decode_check SEED ROUNDS | decode_check bits SEED ROUNDS | decode_check time CASE THREADS\n");
        return 2;
    }
    const uint64_t seed   = strtoull(argv[argc - 2], nullptr, 10);
    const long     rounds = atol(argv[argc - 1]);
    numbers fixed(seed);
    listed(fixed);
    for (long round = 0; round < rounds; round++) {
        numbers random(seed * 1000003 + uint64_t(round));
        const auto  any = [&] { return kind(random.between(0, KINDS - 1)); };
        const kind  kw  = any();
        const kind  ka  = any();
        check_dot(random, kw, ka, random.between(1, 600));
        check_columns(random, kw, ka, BLOCK * random.between(1, 80), random.between(1, 200), random.between(1, 20),
                      random.between(0, 2), int(random.between(1, 5)));
        const int64_t experts = random.between(1, 64);
        check_experts(random, kw, ka, BLOCK * random.between(1, 40), random.between(1, 100), experts,
                      random.between(1, std::min<int64_t>(experts, 8)), random.between(0, 1), int(random.between(1, 5)));
        const attention a = draw(random);
        check(random, a, int(random.between(1, 5)));
    }
    const int code = tell_end(cases, bits_alone);
    return bits_alone ? 0 : code;
}
