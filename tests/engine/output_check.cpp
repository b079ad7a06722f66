// SPDX-License-Identifier: MIT
//
// Prints what a model makes of a text: for each token behind the first its number, the token that was likelier than all
// others, and the logarithm of its own probability.
//
//   output_check MODEL TEXT CHUNK CACHE FLASH THREADS
//
// CHUNK tokens are computed at a time: 1 is decode, hundreds are prefill. CACHE is the type of K and V, f32, f16 or q8_0;
// FLASH is flash attention, 1 or 0.

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

static void quiet(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

// the probability of a token, and the likeliest one, from a row of logits; in double precision, for a small model is
// sure of itself to the last digits that single precision has
static void tell(const float * logits, int32_t size, llama_token token) {
    const float * const largest = std::max_element(logits, logits + size);
    double sum = 0;
    for (int32_t i = 0; i < size; i++) {
        sum += std::exp(double(logits[i]) - double(*largest));
    }
    printf("%d %d %.9g\n", token, int(largest - logits), double(logits[token]) - double(*largest) - std::log(sum));
}

int main(int argc, char ** argv) {
    if (argc != 7) {
        fprintf(stderr, "usage: output_check MODEL TEXT CHUNK CACHE FLASH THREADS\n");
        return 2;
    }
    std::ifstream file(argv[2], std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    const int       chunk = atoi(argv[3]);
    const ggml_type cache = strcmp(argv[4], "f32") == 0    ? GGML_TYPE_F32
                            : strcmp(argv[4], "q8_0") == 0 ? GGML_TYPE_Q8_0
                                                           : GGML_TYPE_F16;
    if (text.empty() || chunk < 1) {
        fprintf(stderr, "output_check: no text in %s, or no chunk of %s tokens\n", argv[2], argv[3]);
        return 2;
    }

    llama_log_set(quiet, nullptr);
    llama_backend_init();
    llama_model_params model_params = llama_model_default_params();
    model_params.use_extra_bufts    = false; // as the service runs: no repacking
    const std::unique_ptr<llama_model, void (*)(llama_model *)> model(llama_model_load_from_file(argv[1], model_params),
                                                                      llama_model_free);
    if (!model) {
        return 1;
    }
    const llama_vocab * const vocab = llama_model_get_vocab(model.get());
    std::vector<llama_token> tokens(text.size() + 8);
    const int32_t count = llama_tokenize(vocab, text.data(), int32_t(text.size()), tokens.data(), int32_t(tokens.size()), true, false);
    if (count < 2) {
        fprintf(stderr, "output_check: %d tokens, expected at least 2\n", count);
        return 1;
    }
    tokens.resize(size_t(count));

    llama_context_params params = llama_context_default_params();
    params.n_ctx           = uint32_t(count);
    params.n_batch         = uint32_t(chunk);
    params.n_ubatch        = uint32_t(chunk);
    params.n_threads       = atoi(argv[6]);
    params.n_threads_batch = params.n_threads;
    params.flash_attn_type = atoi(argv[5]) ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.type_k          = cache;
    params.type_v          = cache;
    const std::unique_ptr<llama_context, void (*)(llama_context *)> context(llama_init_from_model(model.get(), params),
                                                                           llama_free);
    if (!context) {
        return 1;
    }
    llama_batch batch = llama_batch_init(chunk, 0, 1);
    for (int32_t first = 0; first < count - 1; first += chunk) {
        batch.n_tokens = std::min(chunk, count - 1 - first);
        for (int32_t i = 0; i < batch.n_tokens; i++) {
            batch.token[i]     = tokens[size_t(first + i)];
            batch.pos[i]       = first + i;
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i]    = 1;
        }
        if (llama_decode(context.get(), batch) != 0) {
            fprintf(stderr, "output_check: token %d was not computed\n", first);
            return 1;
        }
        for (int32_t i = 0; i < batch.n_tokens; i++) {
            tell(llama_get_logits_ith(context.get(), i), llama_vocab_n_tokens(vocab), tokens[size_t(first + i + 1)]);
        }
    }
    llama_batch_free(batch);
    return 0;
}
