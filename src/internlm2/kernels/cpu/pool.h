// A few threads that share out chunks of work. Chunks are taken one by one by whoever is free, and the caller takes
// them too: when another process holds a core, the threads that do run take over its share, and a worker that never
// woke up is not waited for.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>

#define EXPORTED extern "C" __attribute__((visibility("default")))

using Work = void (*)(void* context, int64_t chunk);

// Runs work(context, chunk) for every chunk in [0, num_chunks) on at most num_threads threads, the caller among
// them, and returns when all are done. A second caller at the same time works alone.
void run_chunks(int64_t num_chunks, int num_threads, Work work, void* context);

// Work on single rows goes to other threads in pieces of so many rows, each worth the microsecond that this takes.
inline int64_t rows_per_chunk(int64_t values_per_row) {
    const int64_t rows = 8192 / (values_per_row > 0 ? values_per_row : 1);
    return rows < 1 ? 1 : rows;
}

// How many workers exist now.
int num_workers();

// Memory that a thread keeps between calls. Null when there is none.
class Scratch {
   public:
    void* take(size_t num_bytes) {
        if (num_bytes > size_) {
            size_ = 0;
            memory_.reset(std::aligned_alloc(64, (num_bytes + 63) / 64 * 64));
            if (memory_ != nullptr) size_ = num_bytes;
        }
        return memory_.get();
    }

   private:
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    std::unique_ptr<void, Free> memory_;
    size_t size_ = 0;
};
