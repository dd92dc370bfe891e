// A persistent team of threads: the caller is thread 0, the others sleep while there is no job.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

// What all threads of the team run at once.
typedef void (*TwJob)(void* context, TwTeam& team, int thread);

struct TwTeam {
    explicit TwTeam(int num_threads);
    ~TwTeam();

    // Run a job on all threads and return when all are done. One caller at a time.
    void run(TwJob job, void* context);

    // Within a job: returns on all threads after all have come. Spins briefly, yields to whoever
    // wants the core, then sleeps.
    void barrier();

    // Within a job: the thread's next unit of work, or -1 when none is left. Each thread walks a
    // range of neighbours of its own and then helps the others. Ranges restart at every barrier.
    int64_t next(int thread, int64_t num_units, int64_t grain) {
        for (int i = 0; i < num_threads_; i++) {
            const int owner = (thread + i) % num_threads_;
            const int64_t chunks = (num_units + grain - 1) / grain;
            const int64_t first = chunks * owner / num_threads_;
            const int64_t length = chunks * (owner + 1) / num_threads_ - first;
            if (ranges_[owner].taken.load(std::memory_order_relaxed) >= length) continue;
            const int64_t unit = ranges_[owner].taken.fetch_add(1, std::memory_order_relaxed);
            if (unit < length) return (first + unit) * grain;
        }
        return -1;
    }

    int size() const { return num_threads_; }

  private:
    struct alignas(64) Range {
        std::atomic<int64_t> taken{0};
    };

    void work(int thread);
    void restart_ranges();
    template <class Ready>
    void wait(Ready ready);
    void wake();

    const int num_threads_;
    std::vector<std::thread> threads_;
    TwJob job_ = nullptr;
    void* context_ = nullptr;
    bool stop_ = false;
    std::vector<Range> ranges_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};  // counts barriers and job starts
    alignas(64) std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
};
