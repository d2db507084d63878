// A few threads that share out chunks of work. Chunks are taken one by one by whoever is free, and the caller takes
// them too: when another process holds a core, the threads that do run take over its share, and a worker that never
// woke up is not waited for.
#pragma once
#include <cstdint>

using Work = void (*)(void* context, int64_t chunk);

// Runs work(context, chunk) for every chunk in [0, num_chunks) on at most num_threads threads, the caller among
// them, and returns when all are done. A second caller at the same time works alone.
void run_chunks(int64_t num_chunks, int num_threads, Work work, void* context);

// How many workers exist now.
int num_workers();
