// SPDX-License-Identifier: MIT
// What the differential tests of ggml's CPU kernels share: seeded numbers, Q8_0 rows with every difficult scale, the
// same sums in double precision with a bound on the rounding of any order of single-precision sums, and a way to
// compute one graph with a number of threads.
#pragma once

#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace reference {

constexpr int BLOCK = 32;

// block_q8_0 as the file format defines it
struct block {
    ggml_fp16_t d;
    int8_t      qs[BLOCK];
};
static_assert(sizeof(block) == 34, "a Q8_0 block has 34 bytes");

// splitmix64: the same numbers everywhere
class numbers {
  public:
    explicit numbers(uint64_t seed) : state(seed) {}

    uint64_t next() {
        uint64_t z = (state += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }

    // of low..high, both included
    int64_t between(int64_t low, int64_t high) { return low + int64_t(next() % uint64_t(high - low + 1)); }

    // of [-1, 1)
    double unit() { return double(int64_t(next()) >> 10) / double(1ll << 53); }

  private:
    uint64_t state;
};

// how the values of a matrix are drawn
enum class kind {
    plain,     // scales near one, all codes
    zeros,     // whole blocks of zero, by scale or by code
    denormal,  // the smallest scales that F16 has
    largest,   // the largest
    saturated, // codes of -128 and 127 alone: what saturates in instructions that add pairs in 16 bits
    mixed,     // a different one in each block
};
constexpr int KINDS = 6;

inline const char * name(kind k) {
    static const char * const names[KINDS] = { "plain", "zeros", "denormal", "largest", "saturated", "mixed" };
    return names[int(k)];
}

inline void fill_block(numbers & random, kind k, block & b) {
    if (k == kind::mixed) {
        k = kind(random.between(0, KINDS - 2));
    }
    float scale = float(0.5 + 0.5 * std::fabs(random.unit())) / 128;
    switch (k) {
        case kind::zeros:    scale = random.between(0, 1) ? 0.0f : scale; break;
        case kind::denormal: scale = float(random.between(1, 1023)) * 5.9604645e-8f; break;
        case kind::largest:  scale = 65504.0f; break;
        default: break;
    }
    // scales may be negative: no quantizer writes that, the format allows it
    b.d = ggml_fp32_to_fp16(random.between(0, 7) == 0 ? -scale : scale);
    for (int8_t & q : b.qs) {
        if (k == kind::saturated) {
            q = random.between(0, 3) ? -128 : 127;
        } else if (k == kind::zeros && scale != 0) {
            q = 0;
        } else {
            q = int8_t(random.between(-128, 127));
        }
    }
}

// an activation row; what reaches the kernels are its Q8_0 blocks
inline void fill_row(numbers & random, kind k, float * x, int64_t n) {
    for (int64_t i = 0; i < n; i += BLOCK) {
        const kind here = k == kind::mixed ? kind(random.between(0, KINDS - 2)) : k;
        double scale = 1;
        switch (here) {
            case kind::zeros:    scale = 0; break;
            case kind::denormal: scale = 1e-5 * std::fabs(random.unit()); break;
            case kind::largest:  scale = 127 * 65504.0; break;
            default: break;
        }
        for (int64_t e = i; e < i + BLOCK; e++) {
            x[e] = float(here == kind::saturated ? (random.between(0, 3) ? -1.0 : 1.0) : scale * random.unit());
        }
    }
}

// the Q8_0 blocks that the CPU backend makes of a row
inline std::vector<block> quantize(const float * x, int64_t n) {
    std::vector<block> blocks(n / BLOCK);
    ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->from_float(x, blocks.data(), n);
    return blocks;
}

struct expected {
    double value;
    double bound; // of the rounding in single precision, in whichever order the products are added
};

// the dot product of two Q8_0 rows: exact integers for each block, sums in double precision
inline expected dot(const block * w, const block * a, int64_t blocks) {
    double sum = 0;
    double magnitude = 0;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t exact = 0;
        int64_t size  = 0;
        for (int e = 0; e < BLOCK; e++) {
            const int64_t product = int64_t(w[b].qs[e]) * a[b].qs[e];
            exact += product;
            size  += std::abs(product);
        }
        const double scale = double(ggml_fp16_to_fp32(w[b].d)) * double(ggml_fp16_to_fp32(a[b].d));
        sum += scale * double(exact);
        magnitude += std::fabs(scale) * double(size);
    }
    // each term is rounded at most three times, each sum at most once for each term; a kernel may sum the lanes of a
    // register over all blocks first, so that the parts are as large as the products of single elements allow
    return { sum, double(blocks + 4) * std::ldexp(magnitude, -24) };
}

inline int failures = 0;
inline uint64_t bits = 0xcbf29ce484222325ull; // of all results so far, in their order (FNV-1a)

// count and tell a result outside of its bound
inline void compare(float found, const expected & want, const std::string & where) {
    uint32_t word;
    memcpy(&word, &found, sizeof(word));
    bits = (bits ^ word) * 0x100000001b3ull;
    if (!(std::fabs(double(found) - want.value) <= want.bound)) {
        if (failures++ < 20) {
            printf("FAIL %s: found %.9g, expected %.9g within %.3g\n", where.c_str(), double(found), want.value, want.bound);
        }
    }
}

// tell how it went, and return the exit code; a comparison of two builds wants the bits alone
inline int tell_end(long cases, bool bits_alone) {
    if (bits_alone) {
        printf("bits=%016llx\n", static_cast<unsigned long long>(bits));
    } else {
        printf("cases=%ld failures=%d\n", cases, failures);
    }
    return failures ? 1 : 0;
}

// a context for one graph
class graph {
  public:
    explicit graph(size_t bytes) {
        ggml_init_params params = { bytes + (1 << 20), nullptr, false };
        context = ggml_init(params);
    }
    ~graph() { ggml_free(context); }
    graph(const graph &) = delete;
    graph & operator=(const graph &) = delete;

    // compute everything that `result` needs; the work buffer has exactly the size that was planned, so that a
    // sanitizer sees whatever passes its end
    void compute(ggml_tensor * result, int threads) {
        ggml_cgraph * nodes = ggml_new_graph(context);
        ggml_build_forward_expand(nodes, result);
        ggml_cplan plan = ggml_graph_plan(nodes, threads, nullptr);
        std::unique_ptr<uint8_t[]> work(new uint8_t[plan.work_size ? plan.work_size : 1]);
        plan.work_data = work.get();
        if (ggml_graph_compute(nodes, &plan) != GGML_STATUS_SUCCESS) {
            printf("FAIL the graph was not computed\n");
            exit(1);
        }
    }

    // the least seconds of some runs
    double best_seconds(ggml_tensor * result, int threads, int runs) {
        double best = 1e9;
        for (int run = 0; run < runs; run++) {
            const auto start = std::chrono::steady_clock::now();
            compute(result, threads);
            best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
        }
        return best;
    }

    ggml_context * context;
};

} // namespace reference
