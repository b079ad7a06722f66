// SPDX-License-Identifier: MIT
//
// Compares FLASH_ATTN_EXT of ggml's CPU backend on many queries (prefill) with double precision.
//
//   attention_check SEED ROUNDS             the listed cases, then that many random ones; exit 1 on a wrong result
//   attention_check bits SEED ROUNDS        the same, but print a hash of the results alone
//   attention_check time DK DV H KV N C T   the seconds of one: H heads on KV heads, N queries over C cells, T threads

#include "kernel_reference.h"

#include <algorithm>

using namespace reference;

struct attention {
    int64_t dk;
    int64_t dv;
    int64_t heads;
    int64_t kv_heads;
    int64_t queries;
    int64_t cells;
    int64_t past;     // cells that the first query sees besides its own
    bool    shared;   // V is the first part of K, as in MLA
    bool    f32;      // K and V in F32
    double  size;     // of the values
};

struct tensors {
    ggml_tensor *q, *k, *v, *mask, *result;
};

static size_t bytes(const attention & s) {
    return size_t(s.dk * s.queries * s.heads * 4 + (s.dk + s.dv) * s.cells * s.kv_heads * 4 + s.cells * s.queries * 2 +
                  s.dv * s.queries * s.heads * 4 + (1 << 20));
}

static tensors make(graph & g, numbers & random, const attention & s) {
    tensors t;
    const ggml_type type = s.f32 ? GGML_TYPE_F32 : GGML_TYPE_F16;
    t.q = ggml_new_tensor_3d(g.context, GGML_TYPE_F32, s.dk, s.queries, s.heads);
    // as in the cache: the heads of a cell lie side by side
    t.k = ggml_permute(g.context, ggml_new_tensor_3d(g.context, type, s.dk, s.kv_heads, s.cells), 0, 2, 1, 3);
    t.v = s.shared ? ggml_view_3d(g.context, t.k, s.dv, s.cells, s.kv_heads, t.k->nb[1], t.k->nb[2], 0)
                   : ggml_permute(g.context, ggml_new_tensor_3d(g.context, type, s.dv, s.kv_heads, s.cells), 0, 2, 1, 3);
    auto fill = [&](ggml_tensor * x, int64_t n) {
        for (int64_t i = 0; i < n; i++) {
            const float value = float(s.size * random.unit());
            if (x->type == GGML_TYPE_F32) {
                static_cast<float *>(x->data)[i] = value;
            } else {
                static_cast<ggml_fp16_t *>(x->data)[i] = ggml_fp32_to_fp16(value);
            }
        }
    };
    fill(t.q, ggml_nelements(t.q));
    fill(t.k, ggml_nelements(t.k));
    if (!s.shared) {
        fill(t.v, ggml_nelements(t.v));
    }
    t.mask = ggml_new_tensor_2d(g.context, GGML_TYPE_F16, s.cells, s.queries);
    ggml_fp16_t * m = static_cast<ggml_fp16_t *>(t.mask->data);
    const ggml_fp16_t no = ggml_fp32_to_fp16(-INFINITY);
    for (int64_t j = 0; j < s.queries; j++) {
        for (int64_t c = 0; c < s.cells; c++) {
            m[j * s.cells + c] = c <= s.past + j ? 0 : no;
        }
    }
    t.result = ggml_flash_attn_ext(g.context, t.q, t.k, t.v, t.mask, 1 / std::sqrt(float(s.dk)), 0, 0);
    return t;
}

static double at(const ggml_tensor * x, int64_t i0, int64_t i1, int64_t i2) {
    const char * p = static_cast<const char *>(x->data) + i0 * x->nb[0] + i1 * x->nb[1] + i2 * x->nb[2];
    return x->type == GGML_TYPE_F32 ? double(*reinterpret_cast<const float *>(p))
                                    : double(ggml_fp16_to_fp32(*reinterpret_cast<const ggml_fp16_t *>(p)));
}

static void check(numbers & random, const attention & s, int threads) {
    graph g(bytes(s));
    const tensors t = make(g, random, s);
    memset(t.result->data, 0xff, ggml_nbytes(t.result));
    g.compute(t.result, threads);

    char where[200];
    snprintf(where, sizeof(where), "attention dk %d dv %d heads %d/%d queries %d cells %d past %d shared %d f32 %d threads %d",
             int(s.dk), int(s.dv), int(s.heads), int(s.kv_heads), int(s.queries), int(s.cells), int(s.past), s.shared, s.f32, threads);
    std::vector<double> p(s.cells);
    for (int64_t h = 0; h < s.heads; h++) {
        const int64_t kv = h / (s.heads / s.kv_heads);
        for (int64_t j = 0; j < s.queries; j++) {
            const int64_t seen = std::min(s.cells, s.past + j + 1);
            double largest = -INFINITY;
            double spread = 0; // by how much rounding may move a score
            for (int64_t c = 0; c < seen; c++) {
                double sum = 0, magnitude = 0;
                for (int64_t i = 0; i < s.dk; i++) {
                    const double product = at(t.q, i, j, h) * at(t.k, i, c, kv);
                    sum += product;
                    magnitude += std::fabs(product);
                }
                p[c] = sum / std::sqrt(double(s.dk));
                largest = std::max(largest, p[c]);
                spread = std::max(spread, double(s.dk + 4) * std::ldexp(magnitude, -24) / std::sqrt(double(s.dk)));
            }
            double total = 0;
            for (int64_t c = 0; c < seen; c++) {
                total += p[c] = std::exp(p[c] - largest);
            }
            for (int64_t i = 0; i < s.dv; i++) {
                double sum = 0, magnitude = 0;
                for (int64_t c = 0; c < seen; c++) {
                    sum += p[c] * at(t.v, i, c, kv);
                    magnitude += p[c] * std::fabs(at(t.v, i, c, kv));
                }
                // scores are off by at most spread, exp by two units in the last place, each sum by one for each term
                const double bound = magnitude / total * (2 * std::expm1(spread) + std::ldexp(double(seen) + 16, -23));
                const float * out = reinterpret_cast<const float *>(static_cast<const char *>(t.result->data) + h * t.result->nb[1] + j * t.result->nb[2]);
                compare(out[i], { sum / total, bound }, where);
            }
        }
    }
}

static double time_one(const attention & s, int threads) {
    numbers random(1);
    graph g(bytes(s));
    const tensors t = make(g, random, s);
    return g.best_seconds(t.result, threads, 5);
}

int main(int argc, char ** argv) {
    ggml_cpu_init();
    if (argc == 9 && strcmp(argv[1], "time") == 0) {
        const attention s = { atoll(argv[2]), atoll(argv[3]), atoll(argv[4]), atoll(argv[5]), atoll(argv[6]), atoll(argv[7]),
                              atoll(argv[7]) - atoll(argv[6]), atoll(argv[5]) == 1, false, 1 };
        printf("seconds=%.6f\n", time_one(s, atoi(argv[8])));
        return 0;
    }
    const bool bits_alone = argc == 4 && strcmp(argv[1], "bits") == 0;
    if (argc != 3 && !bits_alone) {
        fprintf(stderr, "usage: attention_check SEED ROUNDS | attention_check bits SEED ROUNDS |\n"
                        "       attention_check time DK DV HEADS KV_HEADS QUERIES CELLS THREADS\n");
        return 2;
    }
    numbers random(strtoull(argv[argc - 2], nullptr, 10));
    const long rounds = atol(argv[argc - 1]);
    long cases = 0;
    for (bool f32 : { false, true }) {
        // MLA in small, grouped heads, sizes that are no multiple of anything, a tile and its neighbours, one large
        const attention listed[] = {
            { 96, 64, 4, 1, 70, 128, 58, true, f32, 1 },    { 32, 32, 4, 2, 64, 64, 0, false, f32, 1 },
            { 24, 40, 2, 2, 65, 101, 36, false, f32, 1 },   { 64, 64, 2, 1, 129, 193, 64, false, f32, 1 },
            { 40, 40, 1, 1, 64, 71, 0, false, f32, 1 },     { 32, 32, 1, 1, 80, 80, 0, false, f32, 30 },
            { 576, 512, 2, 1, 64, 80, 16, true, f32, 1 },
        };
        for (const attention & s : listed) {
            check(random, s, 1 + int(cases % 3));
            cases++;
        }
    }
    for (long round = 0; round < rounds; round++) {
        const int64_t kv_heads = random.between(1, 3);
        const int64_t dk       = 8 * random.between(2, 20);
        const int64_t queries  = random.between(64, 140);
        const int64_t past     = random.between(0, 100);
        const bool shared      = random.between(0, 1);
        const int64_t dv       = 8 * random.between(2, shared ? dk / 8 : 20);
        check(random,
              { dk, dv, kv_heads * random.between(1, 3), kv_heads, queries, past + queries + random.between(0, 70), past, shared,
                bool(random.between(0, 1)), random.between(0, 4) ? 1.0 : 20.0 },
              int(random.between(1, 4)));
        cases++;
    }
    return tell_end(cases, bits_alone);
}
