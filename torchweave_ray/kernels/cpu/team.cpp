// Job start, barriers and sleep of the thread team.
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
// Some 20 us: longer than a barrier between balanced threads, shorter than a time slice.
constexpr int SPINS = 500;
// Then some 1 ms of asking whether anybody else wants the core: going to sleep and being woken
// costs a virtual machine more than most waits last.
constexpr int YIELDS = 2000;
}  // namespace

TwTeam::TwTeam(int num_threads) : num_threads_(num_threads), ranges_(num_threads) {
    for (int i = 1; i < num_threads; i++) threads_.emplace_back([this, i] { work(i); });
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

// After generation_ changed. A sleeper counts itself before it looks, so none is missed.
void TwTeam::wake() {
    if (sleepers_.load() == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
}

void TwTeam::restart_ranges() {
    for (auto& range : ranges_) range.taken.store(0, std::memory_order_relaxed);
}

void TwTeam::barrier() {
    const uint32_t now = generation_.load();
    if (arrived_.fetch_add(1) == num_threads_ - 1) {
        arrived_.store(0);
        restart_ranges();
        generation_.fetch_add(1);
        wake();
    } else {
        wait([this, now] { return generation_.load() != now; });
    }
}

void TwTeam::run(TwJob job, void* context) {
    job_ = job;
    context_ = context;
    generation_.fetch_add(1);
    wake();
    job(context, *this, 0);
    barrier();
}

void TwTeam::work(int thread) {
    uint32_t seen = 0;
    while (true) {
        wait([this, seen] { return generation_.load() != seen; });
        if (stop_) return;
        job_(context_, *this, thread);
        // The end of the job is a barrier: the next start is one generation after it.
        const uint32_t last = generation_.load();
        barrier();
        seen = last + 1;
    }
}
