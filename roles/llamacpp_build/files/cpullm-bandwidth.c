// GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
// SPDX-License-Identifier: GPL-3.0-or-later
//
// Measures the rate at which CPUs read their own node's memory, and writes it as one line of JSON.
//
//   cpullm-bandwidth --cpus LIST [--bytes N] [--seconds S]
//
// One thread on each CPU of the list fills a part of the buffer and then reads it again and again. It only reads,
// because decoding only reads weights; a benchmark that also writes uses the other direction of the links as well.
// Compiled with -DISA_AVX512 or -DISA_AVX2 for such loads; without either it takes SSE2, which every x86-64 has.
//
// Exit: 0 measured, 1 a system call failed or the sum was wrong, 2 wrong arguments, 3 too little free memory,
// 4 the CPU lacks the instruction set. A signal ends it at once; it leaves nothing behind.

#define _GNU_SOURCE

#include <dirent.h>
#include <errno.h>
#include <getopt.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if defined(ISA_AVX512)
#define ISA "avx512"
#define FEATURE "avx512f"
#define VECTOR_BYTES 64
#elif defined(ISA_AVX2)
#define ISA "avx2"
#define FEATURE "avx2"
#define VECTOR_BYTES 32
#else
#define ISA "sse2"
#define FEATURE "sse2"
#define VECTOR_BYTES 16
#endif

enum { FAILED = 1, ARGUMENTS = 2, MEMORY = 3, PROCESSOR = 4 };

#define MIB ((uint64_t) 1 << 20)
#define HUGE_BYTES (2 * MIB)
#define LEAST_DEFAULT (1024 * MIB)
#define LEAST_USEFUL (64 * MIB)
#define LEAST_PASS_S 0.02 // beside it the threads' meeting at a barrier does not count
#define LEAST_PASSES 3
#define MOST_PASSES 100000
#define MOST_SECONDS 60.0
#define MOST_BYTES ((uint64_t) 1 << 50)
#define ODD UINT64_C(0x9E3779B97F4A7C15) // 2^64 over the golden ratio: no two words of a buffer are equal

typedef uint64_t vector __attribute__((vector_size(VECTOR_BYTES), may_alias));

// What a thread has and finds.
struct part {
    pthread_t thread;
    int cpu;
    int node; // -1 where the kernel shows none
    vector * data;
    uint64_t expected; // sum of its words, made while they were written
    int wrong;         // passes that read another sum
    size_t elsewhere;  // samples of its memory that lie on another node
};

static struct part parts[CPU_SETSIZE];
static int threads;
static size_t vectors; // of each part, a multiple of 8

// Thread 0 writes these between two barriers, the others read them between the next two.
static pthread_barrier_t barrier;
static uint64_t sweeps = 1;
static bool stop;
static double seconds = 1.0;
static double rates[MOST_PASSES]; // 10^9 bytes per second
static int passes;
static double measured_s;

__attribute__((noreturn, format(printf, 2, 3))) static void fail(int code, const char * format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("cpullm-bandwidth: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(code);
}

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double) now.tv_sec + 1e-9 * (double) now.tv_nsec;
}

// Returns the sum of all words. Eight independent sums keep enough loads on their way; only this function is
// compiled for the instruction set, so that everything before the check runs on any CPU.
__attribute__((target(FEATURE), noinline)) static uint64_t sum_of(const vector * data, size_t count) {
    vector s[8] = { { 0 } };
    for (size_t i = 0; i < count; i += 8) {
        s[0] += data[i];
        s[1] += data[i + 1];
        s[2] += data[i + 2];
        s[3] += data[i + 3];
        s[4] += data[i + 4];
        s[5] += data[i + 5];
        s[6] += data[i + 6];
        s[7] += data[i + 7];
    }
    const vector all = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    uint64_t sum = 0;
    for (size_t i = 0; i < VECTOR_BYTES / sizeof(uint64_t); i++) {
        sum += all[i];
    }
    return sum;
}

// Returns the sum of several sweeps over the same memory; the empty assembly makes the compiler read each time.
static uint64_t read_all(const struct part * part, uint64_t times) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < times; i++) {
        sum += sum_of(part->data, vectors);
        __asm__ volatile("" ::: "memory");
    }
    return sum;
}

// Writes the part's memory, which gives it to this CPU's node, and looks where it came to lie.
static void fill(struct part * part) {
    uint64_t * words = (uint64_t *) part->data;
    const size_t count = vectors * (VECTOR_BYTES / sizeof(uint64_t));
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i++) {
        words[i] = i * ODD + (uint64_t) part->cpu;
        sum += words[i];
    }
    part->expected = sum;
    for (size_t i = 0; part->node >= 0 && i < count; i += HUGE_BYTES / sizeof(uint64_t)) {
        int node;
        const unsigned long flags = 1 | 2; // MPOL_F_NODE | MPOL_F_ADDR of linux/mempolicy.h: the node of an address
        if (syscall(SYS_get_mempolicy, &node, NULL, 0UL, &words[i], flags) == 0 && node != part->node) {
            part->elsewhere++;
        }
    }
}

static void * work(void * argument) {
    struct part * part = argument;
    const bool leads = part == &parts[0];
    const double bytes = (double) vectors * VECTOR_BYTES * threads;
    double begun_s = 0;
    fill(part);
    pthread_barrier_wait(&barrier);
    for (bool warm = false;; warm = true) {
        // Before the barrier, so that no read is left out: the rate is rather too low than too high.
        const double start_s = now_s();
        pthread_barrier_wait(&barrier);
        if (stop) {
            return NULL;
        }
        const uint64_t times = sweeps;
        part->wrong += read_all(part, times) != part->expected * times;
        pthread_barrier_wait(&barrier);
        if (!leads) {
            continue;
        }
        const double end_s = now_s();
        const double pass_s = end_s - start_s;
        if (!warm) {
            sweeps = (uint64_t) (LEAST_PASS_S / pass_s) + 1;
            begun_s = end_s;
            continue;
        }
        rates[passes++] = bytes * (double) times / pass_s / 1e9;
        measured_s += pass_s;
        stop = passes == MOST_PASSES || (passes >= LEAST_PASSES && end_s - begun_s >= seconds);
    }
}

// Reads a small file whole; returns whether there was one.
static bool read_file(char * text, size_t size, const char * path) {
    FILE * file = fopen(path, "re");
    if (file == NULL) {
        return false;
    }
    const size_t length = fread(text, 1, size - 1, file);
    text[length] = '\0';
    fclose(file);
    return length > 0;
}

// Takes a number from the front of a text; returns false where there is none or it is too large.
static bool take_number(const char ** text, uint64_t most, uint64_t * number) {
    const char * at = *text;
    for (*number = 0; *at >= '0' && *at <= '9'; at++) {
        if (*number > most / 10) {
            return false;
        }
        *number = *number * 10 + (uint64_t) (*at - '0');
    }
    const bool found = at != *text && *number <= most;
    *text = at;
    return found;
}

// Reads the kernel's list format, such as "0-3,8"; returns false for anything else, and for a list of none.
static bool parse_cpus(const char * text, cpu_set_t * cpus) {
    CPU_ZERO(cpus);
    for (;; text++) {
        uint64_t first, last;
        if (!take_number(&text, CPU_SETSIZE - 1, &first)) {
            return false;
        }
        last = first;
        if (*text == '-') {
            text++;
            if (!take_number(&text, CPU_SETSIZE - 1, &last) || last < first) {
                return false;
            }
        }
        for (; first <= last; first++) {
            CPU_SET(first, cpus);
        }
        if (*text == '\0' || *text == '\n') {
            return true;
        }
        if (*text != ',') {
            return false;
        }
    }
}

// Returns the NUMA node of a CPU: its directory holds a link of that name. -1 on a kernel without NUMA.
static int node_of(int cpu) {
    char path[64];
    snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%d", cpu);
    DIR * directory = opendir(path);
    int node = -1;
    for (struct dirent * entry; directory != NULL && (entry = readdir(directory)) != NULL;) {
        if (sscanf(entry->d_name, "node%d", &node) == 1) {
            break;
        }
    }
    if (directory != NULL) {
        closedir(directory);
    }
    return node;
}

// Returns the bytes of the L3 caches of these CPUs, each counted at its lowest CPU; 0 where the kernel shows none.
static uint64_t l3_of(const cpu_set_t * cpus) {
    uint64_t bytes = 0;
    for (int i = 0; i < threads; i++) {
        for (int index = 0; index < 8; index++) {
            char path[96], text[4096];
            const int cpu = parts[i].cpu;
            const int length = snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%d/cache/index%d/", cpu, index);
            char * name = path + length;
            cpu_set_t sharing;
            strcpy(name, "level");
            if (!read_file(text, sizeof(text), path) || strcmp(text, "3\n") != 0) {
                continue;
            }
            strcpy(name, "shared_cpu_list");
            if (!read_file(text, sizeof(text), path) || !parse_cpus(text, &sharing)) {
                continue;
            }
            int lowest = 0;
            while (lowest < cpu && !(CPU_ISSET(lowest, &sharing) && CPU_ISSET(lowest, cpus))) {
                lowest++;
            }
            uint64_t kib;
            const char * size = text;
            strcpy(name, "size");
            if (lowest == cpu && read_file(text, sizeof(text), path) && take_number(&size, UINT32_MAX, &kib)) {
                bytes += kib << 10;
            }
        }
    }
    return bytes;
}

// Returns the bytes of one line of a node's or the machine's meminfo, 0 where it has none.
static uint64_t meminfo_bytes(const char * text, const char * name) {
    const char * line = strstr(text, name);
    unsigned long long kib;
    return line != NULL && sscanf(line + strlen(name), ": %llu kB", &kib) == 1 ? (uint64_t) kib << 10 : 0;
}

// Returns what a node can give without pressing anyone: free memory, and half of the page cache.
static uint64_t free_bytes(int node) {
    char path[64] = "/proc/meminfo", text[8192];
    if (node >= 0) {
        snprintf(path, sizeof(path), "/sys/devices/system/node/node%d/meminfo", node);
    }
    if (!read_file(text, sizeof(text), path)) {
        fail(FAILED, "%s cannot be read: %s", path, strerror(errno));
    }
    return meminfo_bytes(text, "MemFree") +
           (meminfo_bytes(text, "Active(file)") + meminfo_bytes(text, "Inactive(file)")) / 2;
}

// Returns the bytes of the buffer: those wished, or four times the L3 and at least a GiB. A node gives at most a
// quarter of what it has free, so that nobody else is pressed.
static uint64_t choose_bytes(uint64_t wish, uint64_t l3) {
    uint64_t most = UINT64_MAX, there = 0;
    int poorest = -1;
    for (int i = 0; i < threads; i++) {
        int sharing = 0;
        for (int j = 0; j < threads; j++) {
            sharing += parts[j].node == parts[i].node;
        }
        const uint64_t here = free_bytes(parts[i].node);
        const uint64_t share = here / 4 / (uint64_t) sharing * (uint64_t) threads;
        if (share < most) {
            most = share;
            there = here;
            poorest = parts[i].node;
        }
    }
    const uint64_t usual = 4 * l3 > LEAST_DEFAULT ? 4 * l3 : LEAST_DEFAULT;
    const uint64_t least = wish ? wish : 2 * l3 > LEAST_USEFUL ? 2 * l3 : LEAST_USEFUL;
    if (most < least) {
        fail(MEMORY,
             "node %d: found %llu MiB free, of which a quarter may be taken; expected room for a buffer of %llu MiB%s",
             poorest < 0 ? 0 : poorest, (unsigned long long) (there / MIB), (unsigned long long) (least / MIB),
             wish ? " (--bytes)" : ", twice the caches of these CPUs. Free memory on the node, or give --bytes");
    }
    return wish ? wish : usual < most ? usual : most;
}

// Gives each thread its memory: ordinary pages, huge where the kernel has them at hand, and never those of a pool,
// which belong to the weights.
static void map_parts(uint64_t bytes) {
    const uint64_t each = (bytes / (uint64_t) threads + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES;
    vectors = each / VECTOR_BYTES;
    for (int i = 0; i < threads; i++) {
        char * memory = mmap(NULL, each + HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) {
            fail(MEMORY, "%llu MiB for CPU %d: %s", (unsigned long long) (each / MIB), parts[i].cpu, strerror(errno));
        }
        memory += HUGE_BYTES - (uintptr_t) memory % HUGE_BYTES;
        madvise(memory, each, MADV_HUGEPAGE);
        parts[i].data = (vector *) memory;
    }
}

static void run_threads(void) {
    const int error = pthread_barrier_init(&barrier, NULL, (unsigned) threads);
    if (error) {
        fail(FAILED, "pthread_barrier_init: %s", strerror(error));
    }
    for (int i = 0; i < threads; i++) {
        pthread_attr_t attributes;
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(parts[i].cpu, &one);
        pthread_attr_init(&attributes);
        pthread_attr_setaffinity_np(&attributes, sizeof(one), &one);
        const int refused = pthread_create(&parts[i].thread, &attributes, work, &parts[i]);
        if (refused) {
            fail(FAILED, "a thread on CPU %d: %s", parts[i].cpu, strerror(refused));
        }
        pthread_attr_destroy(&attributes);
    }
    size_t elsewhere = 0;
    for (int i = 0; i < threads; i++) {
        pthread_join(parts[i].thread, NULL);
        elsewhere += parts[i].elsewhere;
        if (parts[i].wrong) {
            fail(FAILED, "CPU %d: %d of %d passes read another sum than was written; memory or program is broken",
                 parts[i].cpu, parts[i].wrong, passes + 1);
        }
    }
    if (elsewhere) {
        fail(MEMORY, "%zu of %llu samples of the buffer lie on another node than their CPU; free memory on its node",
             elsewhere, (unsigned long long) (vectors * VECTOR_BYTES / HUGE_BYTES * (uint64_t) threads));
    }
}

static int by_value(const void * one, const void * other) {
    const double a = *(const double *) one, b = *(const double *) other;
    return (a > b) - (a < b);
}

int main(int argc, char ** argv) {
    static const char usage[] = "usage: cpullm-bandwidth --cpus LIST [--bytes N] [--seconds S]";
    static const struct option options[] = {
        { "cpus", required_argument, NULL, 'c' },    { "bytes", required_argument, NULL, 'b' },
        { "seconds", required_argument, NULL, 's' }, { "help", no_argument, NULL, 'h' },
        { NULL, 0, NULL, 0 },
    };
    const char * list = NULL;
    uint64_t wish = 0;
    cpu_set_t cpus, usable;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        const char * number = optarg;
        char * end = NULL;
        switch (option) {
            case 'c':
                list = optarg;
                break;
            case 'b':
                if (!take_number(&number, MOST_BYTES, &wish) || *number != '\0' || wish == 0) {
                    fail(ARGUMENTS, "--bytes: found '%s', expected a number of bytes from 1 to 2^50", optarg);
                }
                break;
            case 's':
                seconds = strtod(optarg, &end);
                if (end == optarg || *end != '\0' || !(seconds > 0 && seconds <= MOST_SECONDS)) {
                    fail(ARGUMENTS, "--seconds: found '%s', expected above 0 and up to %.0f", optarg, MOST_SECONDS);
                }
                break;
            case 'h':
                puts(usage);
                return 0;
            default:
                fail(ARGUMENTS, "%s", usage);
        }
    }
    if (list == NULL || optind != argc) {
        fail(ARGUMENTS, "%s", usage);
    }
    // The kernel's own lists end in a newline, arguments do not.
    if (strchr(list, '\n') != NULL || !parse_cpus(list, &cpus)) {
        fail(ARGUMENTS, "--cpus: found '%s', expected a list such as 0-7,16, numbers up to %d", list, CPU_SETSIZE - 1);
    }
    if (!__builtin_cpu_supports(FEATURE)) {
        fail(PROCESSOR, "this CPU lacks %s; expected one that a build for %s runs on", FEATURE, ISA);
    }
    // The kernel cuts a set down to what is online and allowed here.
    if (sched_setaffinity(0, sizeof(cpus), &cpus) != 0 || sched_getaffinity(0, sizeof(usable), &usable) != 0 ||
        !CPU_EQUAL(&cpus, &usable)) {
        fail(ARGUMENTS, "--cpus: found '%s', expected CPUs that are online and allowed to this process", list);
    }
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &cpus)) {
            parts[threads].cpu = cpu;
            parts[threads++].node = node_of(cpu);
        }
    }
    // Memory comes from the node of the CPU that touches it first, whatever policy the caller had.
    const long default_policy = 0; // MPOL_DEFAULT of linux/mempolicy.h
    syscall(SYS_set_mempolicy, default_policy, NULL, 0UL);
    // If memory runs out after all, this ends and nothing else does.
    FILE * score = fopen("/proc/self/oom_score_adj", "we");
    if (score != NULL) {
        fputs("1000", score);
        fclose(score);
    }
    map_parts(choose_bytes(wish, l3_of(&cpus)));
    run_threads();

    qsort(rates, (size_t) passes, sizeof(rates[0]), by_value);
    const double median = (rates[(passes - 1) / 2] + rates[passes / 2]) / 2;
    printf("{\"bytes\": %llu, \"seconds\": %.3f, \"gbs\": %.3f, \"gbs_min\": %.3f, \"gbs_max\": %.3f, \"passes\": %d, "
           "\"threads\": %d, \"cpus\": \"%s\", \"isa\": \"%s\"}\n",
           (unsigned long long) (vectors * VECTOR_BYTES * (uint64_t) threads), measured_s, median, rates[0],
           rates[passes - 1], passes, threads, list, ISA);
    if (fflush(stdout) != 0) {
        fail(FAILED, "standard output: %s", strerror(errno));
    }
    return 0;
}
