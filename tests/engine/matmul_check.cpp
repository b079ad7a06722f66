// SPDX-License-Identifier: MIT
//
// Compares MUL_MAT and MUL_MAT_ID of ggml's CPU backend on Q8_0 weights with double precision.
//
//   matmul_check SEED ROUNDS        the listed cases, then that many random ones; exit 1 where a result is out of bounds
//   matmul_check bits SEED ROUNDS   the same, but print a hash of the results alone
//   matmul_check time M N K THREADS the seconds of one product of M weight rows, N activations and K elements, T threads

#include "kernel_reference.h"

#include <algorithm>

using namespace reference;

struct shape {
    int64_t k;            // elements of a row
    int64_t m;            // weight rows
    int64_t n;            // activation rows of a matrix
    int64_t mats0[2];     // weight matrices
    int64_t repeat[2];    // activation matrices for each of them
    bool    permuted;     // activation matrices interleaved, as attention heads are
    int64_t padding;      // blocks after each weight row that belong to no matrix
};

static std::string tell(const char * op, kind kw, kind ka, int threads, const std::vector<int64_t> & sizes) {
    std::string text = std::string(op) + " weights " + name(kw) + " activations " + name(ka) + " threads " +
                       std::to_string(threads) + " sizes";
    for (int64_t size : sizes) {
        text += " " + std::to_string(size);
    }
    return text;
}

static ggml_tensor * make_weights(ggml_context * context, numbers & random, kind k, int64_t elements, int64_t padding,
                                  int64_t rows, int64_t mats2, int64_t mats3) {
    ggml_tensor * whole = ggml_new_tensor_4d(context, GGML_TYPE_Q8_0, elements + padding * BLOCK, rows, mats2, mats3);
    block * blocks = static_cast<block *>(whole->data);
    for (size_t b = 0; b < ggml_nbytes(whole) / sizeof(block); b++) {
        fill_block(random, k, blocks[b]);
    }
    if (padding == 0) {
        return whole;
    }
    return ggml_view_4d(context, whole, elements, rows, mats2, mats3, whole->nb[1], whole->nb[2], whole->nb[3], 0);
}

static void check_mul_mat(numbers & random, kind kw, kind ka, const shape & s, int threads) {
    const int64_t mats2 = s.mats0[0] * s.repeat[0];
    const int64_t mats3 = s.mats0[1] * s.repeat[1];
    const int64_t activations = s.n * mats2 * mats3;
    graph g(size_t(s.k + s.padding * BLOCK) * s.m * s.mats0[0] * s.mats0[1] * 2 + size_t(s.k) * activations * 4 +
            size_t(s.m) * activations * 4);

    ggml_tensor * w = make_weights(g.context, random, kw, s.k, s.padding, s.m, s.mats0[0], s.mats0[1]);
    ggml_tensor * a = s.permuted ? ggml_permute(g.context, ggml_new_tensor_4d(g.context, GGML_TYPE_F32, s.k, mats2, s.n, mats3), 0, 2, 1, 3)
                                 : ggml_new_tensor_4d(g.context, GGML_TYPE_F32, s.k, s.n, mats2, mats3);
    auto row = [&](int64_t j, int64_t i2, int64_t i3) {
        return reinterpret_cast<float *>(static_cast<char *>(a->data) + j * a->nb[1] + i2 * a->nb[2] + i3 * a->nb[3]);
    };
    for (int64_t i3 = 0; i3 < mats3; i3++) {
        for (int64_t i2 = 0; i2 < mats2; i2++) {
            for (int64_t j = 0; j < s.n; j++) {
                fill_row(random, ka, row(j, i2, i3), s.k);
            }
        }
    }
    ggml_tensor * result = ggml_mul_mat(g.context, w, a);
    memset(result->data, 0xff, ggml_nbytes(result)); // NaN: what is not written is found
    g.compute(result, threads);

    const std::string where = tell("mul_mat", kw, ka, threads, { s.k, s.m, s.n, s.mats0[0], s.mats0[1], s.repeat[0], s.repeat[1] });
    for (int64_t i3 = 0; i3 < mats3; i3++) {
        for (int64_t i2 = 0; i2 < mats2; i2++) {
            for (int64_t j = 0; j < s.n; j++) {
                const std::vector<block> q = quantize(row(j, i2, i3), s.k);
                const char * out = static_cast<char *>(result->data) + j * result->nb[1] + i2 * result->nb[2] + i3 * result->nb[3];
                for (int64_t i = 0; i < s.m; i++) {
                    const char * in = static_cast<char *>(w->data) + i * w->nb[1] + i2 / s.repeat[0] * w->nb[2] + i3 / s.repeat[1] * w->nb[3];
                    compare(reinterpret_cast<const float *>(out)[i],
                            dot(reinterpret_cast<const block *>(in), q.data(), s.k / BLOCK), where);
                }
            }
        }
    }
}

// how the tokens of a batch choose their experts
enum class routing {
    even,     // every expert has about as many
    random_,  // by chance
    one,      // all choose the same experts: the others have no token
    skewed,   // the first expert has almost all, and some have one, two, three...
};
constexpr int ROUTINGS = 4;

static void check_mul_mat_id(numbers & random, kind kw, kind ka, routing how, int64_t k, int64_t m, int64_t experts,
                             int64_t used, int64_t tokens, bool shared_row, int threads) {
    const int64_t slots = shared_row ? 1 : used;
    graph g(size_t(k) * m * experts * 2 + size_t(k) * slots * tokens * 4 + size_t(m) * used * tokens * 4 + tokens * experts * 4);
    ggml_tensor * w = make_weights(g.context, random, kw, k, 0, m, experts, 1);
    ggml_tensor * a = ggml_new_tensor_3d(g.context, GGML_TYPE_F32, k, slots, tokens);
    float * x = static_cast<float *>(a->data);
    for (int64_t j = 0; j < slots * tokens; j++) {
        fill_row(random, ka, x + j * k, k);
    }
    ggml_tensor * ids = ggml_new_tensor_2d(g.context, GGML_TYPE_I32, used, tokens);
    int32_t * id = static_cast<int32_t *>(ids->data);
    for (int64_t t = 0; t < tokens; t++) {
        // distinct experts for each token, as a router chooses
        std::vector<int32_t> order(experts);
        for (int64_t e = 0; e < experts; e++) {
            order[e] = int32_t(e);
        }
        if (how == routing::even) {
            std::rotate(order.begin(), order.begin() + t * used % experts, order.end());
        } else if (how == routing::random_ || (how == routing::skewed && random.between(0, 3) == 0)) {
            for (int64_t e = 0; e < experts - 1; e++) {
                std::swap(order[e], order[random.between(e, experts - 1)]);
            }
        }
        std::copy(order.begin(), order.begin() + used, id + t * used);
    }
    ggml_tensor * result = ggml_mul_mat_id(g.context, w, a, ids);
    memset(result->data, 0xff, ggml_nbytes(result));
    g.compute(result, threads);

    const std::string where = tell("mul_mat_id", kw, ka, threads, { k, m, experts, used, tokens, slots, int64_t(how) });
    const block * weights = static_cast<const block *>(w->data);
    const float * out     = static_cast<const float *>(result->data);
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t u = 0; u < used; u++) {
            const std::vector<block> q = quantize(x + (t * slots + u % slots) * k, k);
            for (int64_t i = 0; i < m; i++) {
                const block * in = weights + (id[t * used + u] * m + i) * (k / BLOCK);
                compare(out[(t * used + u) * m + i], dot(in, q.data(), k / BLOCK), where);
            }
        }
    }
}

static double time_mul_mat(int64_t m, int64_t n, int64_t k, int threads) {
    numbers random(1);
    graph g(size_t(k) * m * 2 + size_t(k) * n * 4 + size_t(m) * n * 4 + (1 << 20));
    ggml_tensor * w = make_weights(g.context, random, kind::plain, k, 0, m, 1, 1);
    ggml_tensor * a = ggml_new_tensor_2d(g.context, GGML_TYPE_F32, k, n);
    for (int64_t j = 0; j < n; j++) {
        fill_row(random, kind::plain, static_cast<float *>(a->data) + j * k, k);
    }
    ggml_tensor * result = ggml_mul_mat(g.context, w, a);
    return g.best_seconds(result, threads, 20);
}

int main(int argc, char ** argv) {
    ggml_cpu_init();
    if (argc == 6 && strcmp(argv[1], "time") == 0) {
        const int64_t m = atoll(argv[2]), n = atoll(argv[3]), k = atoll(argv[4]);
        const double seconds = time_mul_mat(m, n, k, atoi(argv[5]));
        printf("seconds=%.6f gmacs=%.1f\n", seconds, double(m) * double(n) * double(k) / seconds / 1e9);
        return 0;
    }
    const bool bits_alone = argc == 4 && strcmp(argv[1], "bits") == 0;
    if (argc != 3 && !bits_alone) {
        fprintf(stderr, "usage: matmul_check SEED ROUNDS | matmul_check bits SEED ROUNDS | matmul_check time M N K THREADS\n");
        return 2;
    }
    numbers random(strtoull(argv[argc - 2], nullptr, 10));
    const long rounds = atol(argv[argc - 1]);
    long cases = 0;
    // every kind of weight with every kind of activation
    for (int kw = 0; kw < KINDS; kw++) {
        for (int ka = 0; ka < KINDS; ka++) {
            check_mul_mat(random, kind(kw), kind(ka), { 96, 33, 19, { 1, 1 }, { 1, 1 }, false, 0 }, 2);
            check_mul_mat_id(random, kind(kw), kind(ka), routing::random_, 96, 33, 6, 2, 23, kw % 2, 2);
            cases += 2;
        }
    }
    // every number of activations around the edges of a tile, of rows around the edges of a panel
    for (int64_t n = 1; n <= 34; n++) {
        check_mul_mat(random, kind::mixed, kind::mixed, { 64, 17, n, { 1, 1 }, { 1, 1 }, false, 0 }, 1);
        check_mul_mat(random, kind::mixed, kind::mixed, { 32, n, 20, { 1, 1 }, { 1, 1 }, false, 0 }, 3);
        check_mul_mat_id(random, kind::mixed, kind::mixed, routing::one, 64, 18, 4, 1, n, true, 2);
        cases += 3;
    }
    for (int how = 0; how < ROUTINGS; how++) {
        check_mul_mat_id(random, kind::mixed, kind::mixed, routing(how), 64, 40, 16, 4, 50, how % 2, 2);
        cases++;
    }
    // rows of several runs of blocks, many weight rows, more threads than work
    check_mul_mat(random, kind::plain, kind::plain, { 32 * 97, 150, 70, { 1, 1 }, { 1, 1 }, false, 0 }, 2);
    check_mul_mat(random, kind::plain, kind::plain, { 64, 5, 9, { 1, 1 }, { 1, 1 }, false, 0 }, 7);
    check_mul_mat_id(random, kind::plain, kind::plain, routing::random_, 32 * 43, 150, 8, 3, 64, false, 3);
    // MLA: one weight matrix for each head, activations interleaved; grouped heads; rows with a gap
    check_mul_mat(random, kind::plain, kind::plain, { 128, 64, 33, { 4, 1 }, { 1, 1 }, true, 0 }, 2);
    check_mul_mat(random, kind::mixed, kind::mixed, { 64, 20, 18, { 2, 2 }, { 3, 2 }, false, 0 }, 2);
    check_mul_mat(random, kind::mixed, kind::mixed, { 64, 20, 18, { 2, 1 }, { 2, 1 }, false, 3 }, 2);
    cases += 6;

    for (long round = 0; round < rounds; round++) {
        const kind kw = kind(random.between(0, KINDS - 1));
        const kind ka = kind(random.between(0, KINDS - 1));
        const int threads = int(random.between(1, 4));
        const int64_t k = BLOCK * random.between(1, random.between(0, 3) ? 8 : 80);
        const int64_t m = random.between(1, random.between(0, 3) ? 40 : 300);
        if (random.between(0, 1)) {
            const bool one = random.between(0, 1);
            const shape s = { k, m, random.between(1, 80),
                              { one ? 1 : random.between(1, 3), one ? 1 : random.between(1, 2) },
                              { one ? 1 : random.between(1, 3), one ? 1 : random.between(1, 2) },
                              bool(random.between(0, 1)), random.between(0, 3) ? 0 : random.between(1, 4) };
            check_mul_mat(random, kw, ka, s, threads);
        } else {
            const int64_t experts = random.between(1, 20);
            check_mul_mat_id(random, kw, ka, routing(random.between(0, ROUTINGS - 1)), k, m, experts,
                             random.between(1, std::min<int64_t>(experts, 6)), random.between(1, 90), random.between(0, 1), threads);
        }
        cases++;
    }
    return tell_end(cases, bits_alone);
}
