// SPDX-License-Identifier: MIT
//
// Drives llama_mmap of a patched llama.cpp without a model, and prints what it saw as "name=value" lines.
//
//   mmap_check load FILE     map the file twice in turn; compare every byte with the file
//   mmap_check unmap FILE    give up the parts of a file of two pages, the second one not full
//   mmap_check check SIZE... compare the pages for files of these sizes with the free ones
//
// The environment variable FAULT lets system calls fail that do not fail by themselves on a sound machine
// (linked with -Wl,--wrap=pread,--wrap=madvise):
//   eio:OFFSET       reading at or after OFFSET returns EIO
//   short            each read brings at most 100000 bytes, and each third is interrupted first
//   truncate:BYTES   the file shrinks to BYTES at the first read
//   touch            the file is written to at the first read
//   no-direct        reads with O_DIRECT return EINVAL
//   old-kernel       MADV_POPULATE_WRITE is unknown
//   no-page:N        populating fails from the Nth page on, as on a node that has none left
//   slow:MS          each read takes MS milliseconds
// HOLD=1 prints "held" and waits for a line on standard input while the pages are in use.

#include "llama-hugepages.h"
#include "llama-impl.h"
#include "llama-mmap.h"

#include <atomic>
#include <cerrno>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <mutex>
#include <set>
#include <string>
#include <thread>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

// what llama-mmap.cpp needs of the rest of llama.cpp

void llama_log_internal(ggml_log_level, const char * fmt, ...) {
    va_list args;
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
}

std::string format(const char * fmt, ...) {
    char buf[8192];
    va_list args;
    va_start(args, fmt);
    vsnprintf(buf, sizeof(buf), fmt, args);
    va_end(args);
    return buf;
}

extern "C" {

FILE * ggml_fopen(const char * fname, const char * mode) {
    return fopen(fname, mode);
}

void ggml_abort(const char * file, int line, const char * fmt, ...) {
    fprintf(stderr, "%s:%d: %s\n", file, line, fmt);
    abort();
}

// faults

static const char * g_file = nullptr;

static bool fault(const char * name, uint64_t & value) {
    const char * wanted = getenv("FAULT");
    const size_t len    = strlen(name);
    if (wanted == nullptr || strncmp(wanted, name, len) != 0) {
        return false;
    }
    value = wanted[len] == ':' ? strtoull(wanted + len + 1, nullptr, 10) : 0;
    return true;
}

ssize_t __real_pread(int fd, void * buf, size_t len, off_t offset);
int     __real_madvise(void * addr, size_t len, int advice);

ssize_t __wrap_pread(int fd, void * buf, size_t len, off_t offset) {
    static std::atomic<int> calls { 0 };
    const int call = calls++;
    uint64_t value;
    if (fault("eio", value) && (uint64_t) offset + len > value) {
        errno = EIO;
        return -1;
    }
    if (fault("short", value)) {
        if (call % 3 == 0) {
            errno = EINTR;
            return -1;
        }
        len = len > 100000 ? 100000 : len;
    }
    // Every reader waits here for the first one: what is meant to happen at the first read has happened before any other.
    static std::once_flag first;
    std::call_once(first, [] {
        uint64_t bytes;
        if (fault("truncate", bytes) && truncate(g_file, bytes) != 0) {
            abort();
        }
        if (fault("touch", bytes)) {
            const int other = open(g_file, O_WRONLY);
            if (other == -1 || pwrite(other, "x", 1, 0) != 1 || close(other) != 0) {
                abort();
            }
        }
    });
    if (fault("no-direct", value) && (fcntl(fd, F_GETFL) & O_DIRECT)) {
        errno = EINVAL;
        return -1;
    }
    if (fault("slow", value)) {
        std::this_thread::sleep_for(std::chrono::milliseconds(value));
    }
    return __real_pread(fd, buf, len, offset);
}

int __wrap_madvise(void * addr, size_t len, int advice) {
    static std::atomic<uint64_t> populated { 0 };
    uint64_t value;
    if (advice == 23 && fault("old-kernel", value)) {
        errno = EINVAL;
        return -1;
    }
    if (advice == 23 && fault("no-page", value) && ++populated >= value) {
        errno = EFAULT;
        return -1;
    }
    return __real_madvise(addr, len, advice);
}

} // extern "C"

// what the kernel says

static std::string field(const std::string & path, const std::string & key) {
    std::ifstream in(path);
    for (std::string line; std::getline(in, line); ) {
        if (line.compare(0, key.size(), key) == 0) {
            return line.substr(line.find_first_not_of(" \t", key.size()));
        }
    }
    return "";
}

static void report_pages(const char * when) {
    printf("hugetlb_kib_%s=%ld\n", when, atol(field("/proc/self/status", "HugetlbPages:").c_str()));
}

// the VmFlags of the mapping that holds `addr`
static std::string vm_flags(const void * addr) {
    std::ifstream in("/proc/self/smaps");
    bool here = false;
    for (std::string line; std::getline(in, line); ) {
        uint64_t first, last;
        if (sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " ", &first, &last) == 2) {
            here = first <= (uint64_t) addr && (uint64_t) addr < last;
        } else if (here && line.compare(0, 8, "VmFlags:") == 0) {
            return line.substr(9);
        }
    }
    return "";
}

static bool same_as_file(const llama_mmap & mapping, const char * fname, size_t first, size_t last) {
    const int fd = open(fname, O_RDONLY);
    std::vector<char> buf(8*1024*1024);
    bool same = true;
    for (size_t pos = first; same && pos < last; ) {
        const ssize_t n = __real_pread(fd, buf.data(), std::min(buf.size(), last - pos), pos);
        same = n > 0 && memcmp((const char *) mapping.addr() + pos, buf.data(), n) == 0;
        pos += n > 0 ? n : 0;
    }
    close(fd);
    return same;
}

// bytes of the file that the page cache holds
static size_t cached(const char * fname) {
    const int fd = open(fname, O_RDONLY);
    struct stat st {};
    fstat(fd, &st);
    void * addr = mmap(NULL, st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    std::vector<unsigned char> pages((st.st_size + 4095) / 4096);
    mincore(addr, st.st_size, pages.data());
    munmap(addr, st.st_size);
    close(fd);
    size_t n = 0;
    for (const unsigned char page : pages) {
        n += page & 1;
    }
    return n*4096;
}

static void load(const char * fname, int turn) {
    llama_file file(fname, "rb");
    llama_mmap mapping(&file);
    printf("in_hugepages=%d\n", mapping.in_hugepages());
    printf("size=%zu\n", mapping.size());
    report_pages("loaded");
    printf("vm_flags=%s\n", vm_flags(mapping.addr()).c_str());
    printf("cached=%zu\n", cached(fname));
    if (getenv("HOLD") && turn == 0) {
        printf("held\n");
        fflush(stdout);
        std::string line;
        std::getline(std::cin, line);
    }
    printf("same=%d\n", same_as_file(mapping, fname, 0, mapping.size()));
}

static void unmap(const char * fname) {
    constexpr size_t GIB = LLAMA_HUGEPAGE_SIZE;
    llama_file file(fname, "rb");
    llama_mmap mapping(&file);
    const size_t size = mapping.size();
    report_pages("loaded");
    mapping.unmap_fragment(0, 1000);             // metadata: less than a page
    mapping.unmap_fragment(GIB - 1, GIB + 1);    // no whole page
    report_pages("after_parts");
    mapping.unmap_fragment(0, GIB + GIB/5);      // the first page and a part of the second
    report_pages("after_first");
    printf("same=%d\n", same_as_file(mapping, fname, GIB, size));
    mapping.unmap_fragment(GIB + GIB/4, size);   // a part of the second with its padding
    report_pages("after_part");
    mapping.unmap_fragment(GIB, size);           // the second with its padding
    report_pages("after_last");
}

int main(int argc, char ** argv) {
    const std::string what = argc > 1 ? argv[1] : "";
    if (argc < 3) {
        return 2;
    }
    g_file = argv[2];
    try {
        if (what == "load") {
            load(argv[2], 0);
            report_pages("freed");
            load(argv[2], 1);
            report_pages("freed");
        } else if (what == "unmap") {
            unmap(argv[2]);
            report_pages("freed");
        } else if (what == "check") {
            std::vector<size_t> sizes;
            for (int i = 2; i < argc; i++) {
                sizes.push_back(strtoull(argv[i], nullptr, 10));
            }
            llama_hugepages_check(sizes);
        } else {
            return 2;
        }
    } catch (const std::exception & e) {
        fflush(stdout);
        fprintf(stderr, "error: %s\n", e.what());
        report_pages("freed");
        return 1;
    }
    return 0;
}
