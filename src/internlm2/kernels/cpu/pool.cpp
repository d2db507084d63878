#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

// A worker that has nothing to do looks for work so long before it sleeps: longer than the Python between two calls
// of a decoding step, shorter than what another program on the core would feel.
constexpr auto SPIN = std::chrono::microseconds(100);
constexpr int MAX_WORKERS = 255;

// When a worker loses its core in the middle of a chunk, everybody waits for it, milliseconds instead of microseconds.
// A call that waited longer than this, and for more than a quarter of its time, is a sign that the cores are shared:
// the caller then works alone for a while, twice as long each time, and tries again.
using Clock = std::chrono::steady_clock;
constexpr auto LONG_WAIT = std::chrono::microseconds(50);
constexpr auto SHORTEST_RETREAT = std::chrono::milliseconds(10);
constexpr auto LONGEST_RETREAT = std::chrono::milliseconds(640);

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

class Pool {
   public:
    void run(int64_t num_chunks, int num_threads, Work work, void* context) {
        const auto start = Clock::now();
        if (start < alone_until_) {
            for (int64_t chunk = 0; chunk < num_chunks; ++chunk) work(context, chunk);
            return;
        }
        grow(num_threads - 1);
        work_ = work;
        context_ = context;
        num_chunks_ = num_chunks;
        done_.store(0, std::memory_order_relaxed);
        limit_.store(num_threads - 1, std::memory_order_relaxed);
        // The ticket holds the job's number in its high half, so that a late worker cannot take a chunk of one job
        // believing it to be of another, and the chunks that are left in its low half.
        const uint64_t job = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
        ticket_.store(job << 32 | uint64_t(num_chunks), std::memory_order_seq_cst);
        if (num_asleep_.load(std::memory_order_seq_cst) > 0) {
            const std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        while (take()) {
        }
        const auto idle = Clock::now();
        wait(num_chunks);
        const auto end = Clock::now();
        if (end - idle > LONG_WAIT && 4 * (end - idle) > end - start) {
            alone_until_ = end + retreat_;
            retreat_ = 2 * retreat_ < LONGEST_RETREAT ? 2 * retreat_ : LONGEST_RETREAT;
        } else if (retreat_ > SHORTEST_RETREAT) {
            retreat_ -= std::chrono::milliseconds(1);
        }
    }

    int size() const { return num_workers_; }

   private:
    bool has_work() const { return (ticket_.load(std::memory_order_seq_cst) & 0xffffffff) != 0; }

    // NOTE: work_, context_ and num_chunks_ may be read only after a chunk is won: until it is counted as done, the
    // caller cannot return and nobody overwrites them.
    bool take() {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        do {
            if ((ticket & 0xffffffff) == 0) return false;
        } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel));
        work_(context_, num_chunks_ - int64_t(ticket & 0xffffffff));
        done_.fetch_add(1, std::memory_order_release);
        return true;
    }

    // Whoever still has a chunk may have lost its core: after a short spin, offer ours.
    void wait(int64_t num_chunks) const {
        for (int turn = 0; done_.load(std::memory_order_acquire) != num_chunks; ++turn) {
            if (turn < 1000) {
                pause();
            } else {
                sched_yield();
            }
        }
    }

    void grow(int wanted) {
        wanted = wanted < MAX_WORKERS ? wanted : MAX_WORKERS;
        try {
            while (num_workers_ < wanted) {
                std::thread([this, index = num_workers_] { live(index); }).detach();
                ++num_workers_;
            }
        } catch (const std::system_error&) {
            // The system gives no more threads: the caller does their share.
        }
    }

    void live(int index) {
        for (;;) {
            const bool may_work = index < limit_.load(std::memory_order_relaxed);
            if (may_work && take()) continue;
            if (may_work && spin()) continue;
            std::unique_lock<std::mutex> lock(mutex_);
            num_asleep_.fetch_add(1, std::memory_order_seq_cst);
            wake_.wait(lock, [&] { return index < limit_.load(std::memory_order_relaxed) && has_work(); });
            num_asleep_.fetch_sub(1, std::memory_order_seq_cst);
        }
    }

    bool spin() const {
        const auto end = Clock::now() + SPIN;
        do {
            for (int turn = 0; turn < 64; ++turn) {
                if (has_work()) return true;
                pause();
            }
        } while (Clock::now() < end);
        return false;
    }

    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) std::atomic<int> limit_{0};
    std::atomic<int> num_asleep_{0};
    Work work_ = nullptr;
    void* context_ = nullptr;
    int64_t num_chunks_ = 0;
    int num_workers_ = 0;
    Clock::time_point alone_until_{};
    Clock::duration retreat_ = SHORTEST_RETREAT;
    std::mutex mutex_;
    std::condition_variable wake_;
};

// Never destroyed: workers may outlive main(). After a fork the child has no workers, so it starts a pool of its own.
struct Holder {
    std::atomic<Pool*> pool{new Pool};
    std::atomic<std::mutex*> busy{new std::mutex};
};

Holder& holder() {
    static Holder* const all = [] {
        pthread_atfork(nullptr, nullptr, [] {
            holder().pool.store(new Pool);
            holder().busy.store(new std::mutex);
        });
        return new Holder;
    }();
    return *all;
}

}  // namespace

void run_chunks(int64_t num_chunks, int num_threads, Work work, void* context) {
    std::unique_lock<std::mutex> lock(*holder().busy.load(), std::defer_lock);
    if (num_threads <= 1 || num_chunks <= 1 || !lock.try_lock()) {
        for (int64_t chunk = 0; chunk < num_chunks; ++chunk) work(context, chunk);
        return;
    }
    holder().pool.load()->run(num_chunks, num_threads, work, context);
}

int num_workers() { return holder().pool.load()->size(); }
