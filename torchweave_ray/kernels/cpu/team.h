// A persistent team of threads: the caller is thread 0, the others sleep while there is no job.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

// What all threads of the team run at once.
typedef void (*TwJob)(void* context, TwTeam& team);

struct TwTeam {
    explicit TwTeam(int num_threads);
    ~TwTeam();

    // Run a job on all threads and return when all are done. One caller at a time.
    void run(TwJob job, void* context);

    // Within a job: returns on all threads after all have come. Spins briefly, then sleeps, so
    // that a thread of somebody else's on the same core is not kept waiting.
    void barrier();

    // Within a job: the next unit of work below `end`, or -1. Counters restart at every barrier.
    int64_t next(int64_t end, int64_t grain = 1) {
        const int64_t unit = counter_.fetch_add(grain, std::memory_order_relaxed);
        return unit < end ? unit : -1;
    }

    int size() const { return num_threads_; }

  private:
    void work();
    template <class Ready>
    void wait(Ready ready);
    void wake();

    const int num_threads_;
    std::vector<std::thread> threads_;
    TwJob job_ = nullptr;
    void* context_ = nullptr;
    bool stop_ = false;
    alignas(64) std::atomic<int64_t> counter_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};  // counts barriers and job starts
    alignas(64) std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
};
