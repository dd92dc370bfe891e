// How the team's threads share out units, wait for each other, and sleep.
#include "api.h"

#include "team.h"

#include <sched.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define TW_PAUSE() _mm_pause()
#else
#define TW_PAUSE() ((void)0)
#endif

namespace {
// Some 20 us, the length of a unit.
constexpr int SPINS = 500;
// Then some 1 ms of asking whether anybody else wants the core: going to sleep and being woken
// costs a virtual machine more than most waits last.
constexpr int YIELDS = 2000;
constexpr int OPEN = 1 << 30;
}  // namespace

TwTeam::TwTeam(int num_threads) : num_threads_(num_threads) {
    for (int i = 1; i < num_threads; i++) threads_.emplace_back([this, i] { serve(i); });
}

TwTeam::~TwTeam() {
    stop_ = true;
    generation_.fetch_add(1);
    wake();
    for (auto& thread : threads_) thread.join();
}

template <class Ready>
void TwTeam::wait(Ready ready) {
    for (int i = 0; i < SPINS; i++) {
        if (ready()) return;
        TW_PAUSE();
    }
    for (int i = 0; i < YIELDS; i++) {
        if (ready()) return;
        sched_yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    changed_.wait(lock, ready);
    sleepers_.fetch_sub(1);
}

// After something changed that others wait for. A sleeper counts itself before it looks, so none
// is missed.
void TwTeam::wake() {
    if (sleepers_.load() == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
}

void TwTeam::run(const TwJob& job) {
    Board& board = boards_[(generation_.load() + 1) & 1];
    wait([&board] { return board.gate.load() == 0; });
    prepare(board, job);
    board.gate.store(OPEN);
    generation_.fetch_add(1);
    wake();
    walk(board, 0);
    board.gate.fetch_sub(OPEN);
}

void TwTeam::prepare(Board& board, const TwJob& job) {
    board.job = job;
    board.num_units.resize(job.num_stages);
    for (int64_t i = 0; i < job.num_stages; i++) board.num_units[i] = job.num_units(job.context, i);
    const size_t wanted = job.num_stages * (num_threads_ + 1);
    if (board.num_counters < wanted) {
        board.counters.reset(new Counter[wanted]);
        board.num_counters = wanted;
    }
    for (size_t i = 0; i < wanted; i++)
        board.counters[i].value.store(0, std::memory_order_relaxed);
}

// Each thread walks a range of neighbours of its own and then helps the others; -1: none is left.
int64_t TwTeam::take(Counter* taken, int64_t num_units, int thread) {
    for (int i = 0; i < num_threads_; i++) {
        const int owner = (thread + i) % num_threads_;
        const int64_t first = num_units * owner / num_threads_;
        const int64_t length = num_units * (owner + 1) / num_threads_ - first;
        if (taken[owner].value.load(std::memory_order_relaxed) >= length) continue;
        const int64_t unit = taken[owner].value.fetch_add(1, std::memory_order_relaxed);
        if (unit < length) return first + unit;
    }
    return -1;
}

void TwTeam::walk(Board& board, int thread) {
    const int64_t num_stages = (int64_t)board.num_units.size();
    for (int64_t stage = 0; stage < num_stages; stage++) {
        Counter* taken = &board.counters[stage * (num_threads_ + 1)];
        std::atomic<int64_t>& done = taken[num_threads_].value;
        const int64_t num_units = board.num_units[stage];
        int64_t mine = 0;
        for (int64_t unit; (unit = take(taken, num_units, thread)) >= 0; mine++)
            board.job.work(board.job.context, stage, unit);
        if (mine > 0 && done.fetch_add(mine) + mine == num_units) wake();
        if (done.load() < num_units) wait([&] { return done.load() == num_units; });
    }
}

void TwTeam::serve(int thread) {
    uint32_t seen = 0;
    while (true) {
        wait([this, seen] { return generation_.load() != seen; });
        if (stop_) return;
        seen = generation_.load();
        Board& board = boards_[seen & 1];
        int inside = board.gate.load();
        while (inside >= OPEN && !board.gate.compare_exchange_weak(inside, inside + 1)) continue;
        if (inside < OPEN) continue;  // over already
        walk(board, thread);
        board.gate.fetch_sub(1);
        wake();
    }
}
