// One parallel region with dynamic work, on the OpenMP runtime that torch has already started.
//
// The library does not link to an OpenMP runtime: Python hands over the address of `GOMP_parallel` (libgomp and libomp both export it)
// from the runtime loaded by torch, so a second thread pool cannot come into being. Without one, work runs on the caller's thread.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace attnreg {

typedef void (*ParallelEntry)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

inline ParallelEntry& parallel_entry() {
    static ParallelEntry entry = nullptr;
    return entry;
}

// Calls work(item, worker) for each item in [0, items), items handed out in order to whichever worker is free. `worker` is below
// `threads`. With one thread no parallel region is entered, which is what makes forked children safe.
template <class Work>
void parallel_for(int64_t items, int64_t threads, const Work& work) {
    if (threads > items) threads = items;
    if (threads <= 1 || parallel_entry() == nullptr) {
        for (int64_t item = 0; item < items; ++item) work(item, 0);
        return;
    }
    struct Shared {
        const Work* work;
        int64_t items;
        std::atomic<int64_t> next_item;
        std::atomic<int64_t> next_worker;
    } shared{&work, items, {0}, {0}};
    parallel_entry()(
        [](void* data) {
            Shared& s = *static_cast<Shared*>(data);
            const int64_t worker = s.next_worker.fetch_add(1);
            for (int64_t item; (item = s.next_item.fetch_add(1)) < s.items;) (*s.work)(item, worker);
        },
        &shared, unsigned(threads), 0);
}

// Scratch memory of one thread, kept between calls and grown on demand; 64-byte aligned.
class Scratch {
  public:
    // At least `bytes`, contents undefined; nullptr when memory is short.
    static char* get(size_t bytes) {
        static thread_local Scratch scratch;
        if (bytes > scratch.size_) {
            std::free(scratch.base_);
            scratch.size_ = 0;
            const size_t rounded = (bytes + 4095) / 4096 * 4096;
            scratch.base_ = static_cast<char*>(std::aligned_alloc(4096, rounded));
            if (scratch.base_ != nullptr) scratch.size_ = rounded;
        }
        return scratch.base_;
    }
    ~Scratch() { std::free(base_); }

  private:
    char* base_ = nullptr;
    size_t size_ = 0;
};

// Hands out aligned pieces of one scratch block.
class Carver {
  public:
    explicit Carver(char* base) : base_(base) {}
    template <class T>
    T* take(size_t count) {
        T* piece = reinterpret_cast<T*>(base_ + used_);
        used_ += (count * sizeof(T) + 63) / 64 * 64;
        return piece;
    }
    size_t used() const { return used_; }

  private:
    char* base_;
    size_t used_ = 0;
};

}  // namespace attnreg

namespace attnreg {
// What an exported entry returns: the kernel's own status, or 1 where memory is short. No exception may leave into Python.
template <class Run>
int64_t guarded(const Run& run) {
    try {
        return run();
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
}  // namespace attnreg

#define ATTNREG_EXPORT extern "C" __attribute__((visibility("default")))
// Every translation unit that becomes a library exports this once; see build.py.
#define ATTNREG_EXPORT_PARALLEL \
    ATTNREG_EXPORT void attnreg_set_parallel(void* entry) { \
        attnreg::parallel_entry() = reinterpret_cast<attnreg::ParallelEntry>(entry); \
    }
