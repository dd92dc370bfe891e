// A persistent team of threads that computes jobs stage by stage. The caller is thread 0.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

// Stages in order; the units of one stage in any order, each once, side by side.
struct TwJob {
    int64_t num_stages;
    int64_t (*num_units)(const void* context, int64_t stage);
    void (*work)(const void* context, int64_t stage, int64_t unit);
    const void* context;
};

// A stage ends when its units are done, not when all threads have come: one that lost its core
// between two units delays nobody, and joins in again wherever the others are by then.
struct TwTeam {
    explicit TwTeam(int num_threads);
    ~TwTeam();

    // Returns when all stages are done. One caller at a time.
    void run(const TwJob& job);

    int size() const { return num_threads_; }

  private:
    struct alignas(64) Counter {
        std::atomic<int64_t> value{0};
    };

    // Everything that a thread reads between two units lies here and not in the job, whose caller
    // may have gone on: it waits for nobody but for the units themselves.
    struct Board {
        TwJob job;
        std::vector<int64_t> num_units;       // of each stage
        std::unique_ptr<Counter[]> counters;  // a stage: units taken of each range, then units done
        size_t num_counters = 0;
        alignas(64) std::atomic<int> gate{0};  // threads inside, plus OPEN while it may be entered
    };

    void prepare(Board& board, const TwJob& job);
    void walk(Board& board, int thread);
    int64_t take(Counter* taken, int64_t num_units, int thread);
    void serve(int thread);
    template <class Ready>
    void wait(Ready ready);
    void wake();

    const int num_threads_;
    std::vector<std::thread> threads_;
    std::atomic<bool> stop_{false};
    Board boards_[2];  // by turns: a thread may still be leaving the one before
    alignas(64) std::atomic<uint32_t> generation_{0};  // counts jobs; its last bit names the board
    alignas(64) std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
};
