#include "pool.h"

#include <time.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bittern {

namespace {

// A stage's number may come round again: a claim of a word that is the present one is a claim of the present stage.
constexpr int stage_bits = 16, count_bits = 24;
constexpr uint64_t count_mask = (1u << count_bits) - 1, stage_mask = (1u << stage_bits) - 1;
// A stage of a small model takes 5 to 50 us, and the serial part between two of them 1 to 3.
constexpr int64_t spin_ns = 50'000;

uint64_t pack(uint64_t stage, uint64_t jobs, uint64_t next) {
    return (stage & stage_mask) << (2 * count_bits) | jobs << count_bits | next;
}
uint64_t jobs_of(uint64_t word) { return word >> count_bits & count_mask; }
uint64_t next_of(uint64_t word) { return word & count_mask; }

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1'000'000'000ll + t.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// True as soon as ready() is, false after the spinning time.
template <typename F>
bool spin(F ready) {
    const int64_t end = now_ns() + spin_ns;
    do {
        for (int i = 0; i < 32; i++) {
            if (ready()) return true;
            relax();
        }
    } while (now_ns() < end);
    return false;
}

#if defined(__linux__)
void sleep_while(std::atomic<uint32_t> &value, uint32_t seen) {
    syscall(SYS_futex, reinterpret_cast<uint32_t *>(&value), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}
void wake_all(std::atomic<uint32_t> &value) {
    syscall(SYS_futex, reinterpret_cast<uint32_t *>(&value), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}
#else
void sleep_while(std::atomic<uint32_t> &value, uint32_t seen) {
    const timespec moment = {0, 50'000};
    if (value.load(std::memory_order_acquire) == seen) nanosleep(&moment, nullptr);
}
void wake_all(std::atomic<uint32_t> &) {}
#endif

}  // namespace

bool Pool::start(int threads) {
    threads_ = threads;
    for (int i = 1; i < threads; i++) {
        starts_[i] = {this, i};
        if (pthread_create(&handles_[i], nullptr, enter, &starts_[i]) != 0) return false;
        started_ = i;
    }
    return true;
}

Pool::~Pool() {
    quit_.store(true, std::memory_order_seq_cst);
    bell_.fetch_add(1, std::memory_order_seq_cst);
    wake_all(bell_);
    for (int i = 1; i <= started_; i++) pthread_join(handles_[i], nullptr);
}

void *Pool::enter(void *start) {
    const Start *s = static_cast<Start *>(start);
    s->pool->work(s->thread);
    return nullptr;
}

// A successful claim keeps the stage alive until the job is done, so job_ and arguments_ are safe to read after it.
bool Pool::claim_one(uint64_t word, int thread) {
    if (next_of(word) >= jobs_of(word)) return false;
    const bool claimed =
        word_.compare_exchange_strong(word, word + 1, std::memory_order_acq_rel, std::memory_order_relaxed);
    if (!claimed) return true;
    const uint32_t jobs = static_cast<uint32_t>(jobs_of(word));
    job_(arguments_, static_cast<int>(next_of(word)), thread);
    if (done_.fetch_add(1, std::memory_order_seq_cst) + 1 == jobs && thread != 0 &&
        waiting_.load(std::memory_order_seq_cst) != 0) {
        wake_all(done_);
    }
    return true;
}

void Pool::publish(int jobs, Job job, void *arguments) {
    job_ = job;
    arguments_ = arguments;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t stage = (word_.load(std::memory_order_relaxed) >> (2 * count_bits)) + 1;
    word_.store(pack(stage, static_cast<uint64_t>(jobs), 0), std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst) != 0) {
        bell_.fetch_add(1, std::memory_order_seq_cst);
        wake_all(bell_);
    }
    while (claim_one(word_.load(std::memory_order_acquire), 0)) {
    }
    const uint32_t all = static_cast<uint32_t>(jobs);
    if (spin([&] { return done_.load(std::memory_order_acquire) == all; })) return;
    waiting_.store(1, std::memory_order_seq_cst);
    for (uint32_t seen; (seen = done_.load(std::memory_order_seq_cst)) != all;) sleep_while(done_, seen);
    waiting_.store(0, std::memory_order_relaxed);
}

void Pool::work(int thread) {
    for (;;) {
        // In one order with asleep_: either this sees the new stage, or its publisher sees a sleeper.
        auto free_job = [&] {
            const uint64_t word = word_.load(std::memory_order_seq_cst);
            return next_of(word) < jobs_of(word);
        };
        while (claim_one(word_.load(std::memory_order_acquire), thread)) {
        }
        if (quit_.load(std::memory_order_acquire)) return;
        if (spin([&] { return free_job() || quit_.load(std::memory_order_relaxed); })) continue;
        const uint32_t seen = bell_.load(std::memory_order_seq_cst);
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        if (!free_job() && !quit_.load(std::memory_order_seq_cst)) sleep_while(bell_, seen);
        asleep_.fetch_sub(1, std::memory_order_seq_cst);
    }
}

}  // namespace bittern
