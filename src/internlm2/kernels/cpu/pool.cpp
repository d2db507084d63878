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

// A share is a range of chunks that one thread takes from the front, so that it reads the memory as one stream; whoever
// has done its own share takes from the back of another's. The job's number is part of the word, so that a late worker
// cannot take a chunk of one job believing it to be of another.
struct Share {
    static constexpr int BITS = 20;
    static constexpr uint64_t MASK = (uint64_t(1) << BITS) - 1;

    static uint64_t make(uint64_t job, uint64_t begin, uint64_t end) { return job << 2 * BITS | begin << BITS | end; }

    // A chunk of the current job, or -1.
    int64_t take(bool from_front) {
        uint64_t word = range.load(std::memory_order_acquire);
        for (;;) {
            const uint64_t begin = word >> BITS & MASK, end = word & MASK;
            if (begin >= end) return -1;
            const uint64_t rest = from_front ? word + (uint64_t(1) << BITS) : word - 1;
            if (range.compare_exchange_weak(word, rest, std::memory_order_acq_rel, std::memory_order_acquire)) {
                return int64_t(from_front ? begin : end - 1);
            }
        }
    }

    alignas(64) std::atomic<uint64_t> range{0};
};

class Pool {
   public:
    static constexpr int64_t MAX_CHUNKS = int64_t(Share::MASK);

    void run(int64_t num_chunks, int num_threads, Work work, void* context) {
        const auto start = Clock::now();
        if (start < alone_until_) {
            for (int64_t chunk = 0; chunk < num_chunks; ++chunk) work(context, chunk);
            return;
        }
        grow(num_threads - 1);
        num_threads = num_workers_ < num_threads - 1 ? num_workers_ + 1 : num_threads;
        work_ = work;
        context_ = context;
        done_.store(0, std::memory_order_relaxed);
        const bool is_more = num_threads > num_shares_.exchange(num_threads, std::memory_order_relaxed);
        const uint64_t job = job_.load(std::memory_order_relaxed) + 1;
        for (int64_t i = 0; i < num_threads; ++i) {
            const uint64_t begin = uint64_t(num_chunks * i / num_threads);
            const uint64_t end = uint64_t(num_chunks * (i + 1) / num_threads);
            shares_[i].range.store(Share::make(job, begin, end), std::memory_order_release);
        }
        job_.store(job, std::memory_order_seq_cst);
        if (is_more || num_asleep_.load(std::memory_order_seq_cst) > 0) {
            const std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
            if (is_more) wanted_.notify_all();
        }
        work_on(0);
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
    // Does chunks until none is left. NOTE: work_ and context_ may be read only after a chunk is won: until it is
    // counted as done, the caller cannot return and nobody overwrites them.
    void work_on(int own) {
        const int num_shares = num_shares_.load(std::memory_order_relaxed);
        for (int i = 0; i < num_shares; ++i) {
            Share& share = shares_[(own + i) % num_shares];
            for (int64_t chunk; (chunk = share.take(i == 0)) >= 0;) {
                work_(context_, chunk);
                done_.fetch_add(1, std::memory_order_release);
            }
        }
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
                std::thread([this, index = num_workers_, job = job_.load()] { live(index + 1, job); }).detach();
                ++num_workers_;
            }
        } catch (const std::system_error&) {
            // The system gives no more threads: the caller does their share.
        }
    }

    // own: the number of this worker's share. seen: the last job that was there before it.
    void live(int own, uint64_t seen) {
        for (;;) {
            if (own >= num_shares_.load(std::memory_order_relaxed)) {
                std::unique_lock<std::mutex> lock(mutex_);
                wanted_.wait(lock, [&] { return own < num_shares_.load(std::memory_order_relaxed); });
            } else if (!spin(seen)) {
                std::unique_lock<std::mutex> lock(mutex_);
                num_asleep_.fetch_add(1, std::memory_order_seq_cst);
                wake_.wait(lock, [&] { return job_.load(std::memory_order_seq_cst) != seen; });
                num_asleep_.fetch_sub(1, std::memory_order_seq_cst);
            }
            seen = job_.load(std::memory_order_acquire);
            if (own < num_shares_.load(std::memory_order_relaxed)) work_on(own);
        }
    }

    // Whether a new job came within a short time.
    bool spin(uint64_t seen) const {
        const auto end = Clock::now() + SPIN;
        do {
            for (int turn = 0; turn < 64; ++turn) {
                if (job_.load(std::memory_order_seq_cst) != seen) return true;
                pause();
            }
        } while (Clock::now() < end);
        return false;
    }

    Share shares_[MAX_WORKERS + 1];
    alignas(64) std::atomic<uint64_t> job_{0};
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) std::atomic<int> num_shares_{0};
    std::atomic<int> num_asleep_{0};
    Work work_ = nullptr;
    void* context_ = nullptr;
    int num_workers_ = 0;
    Clock::time_point alone_until_{};
    Clock::duration retreat_ = SHORTEST_RETREAT;
    std::mutex mutex_;
    std::condition_variable wake_;    // there is a new job
    std::condition_variable wanted_;  // jobs have more shares now
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
    if (num_threads <= 1 || num_chunks <= 1 || num_chunks > Pool::MAX_CHUNKS || !lock.try_lock()) {
        for (int64_t chunk = 0; chunk < num_chunks; ++chunk) work(context, chunk);
        return;
    }
    holder().pool.load()->run(num_chunks, num_threads, work, context);
}

int num_workers() { return holder().pool.load()->size(); }
