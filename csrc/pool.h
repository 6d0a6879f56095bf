// Threads for stages of a few microseconds.
//
// The caller publishes a stage of jobs and works on it like everybody else; whoever is free claims the next job. The
// caller never waits for a thread to arrive, only for jobs that a thread has claimed, so a thread that the system has
// put aside costs its share and nothing more. Waiting spins for a moment, then sleeps: a sleeping core is where the
// system can move a thread that a busy neighbour keeps from running.
#ifndef BITTERN_POOL_H
#define BITTERN_POOL_H

#include <atomic>
#include <cstdint>
#include <pthread.h>

namespace bittern {

class Pool {
   public:
    using Job = void (*)(void *arguments, int job, int thread);

    static constexpr int max_threads = 256;

    // Returns false when a thread cannot be started; the pool is then unusable but can be destroyed.
    bool start(int threads);
    ~Pool();

    int threads() const { return threads_; }

    // f(job, thread) for every job in [0, jobs), in any order, on any thread; all are done on return.
    // Fewer than 2^24 jobs; one caller at a time.
    template <typename F>
    void run(int jobs, F &&f) {
        if (jobs <= 0) return;
        if (threads_ == 1 || jobs == 1) {
            for (int job = 0; job < jobs; job++) f(job, 0);
            return;
        }
        publish(jobs, [](void *g, int job, int thread) { (*static_cast<F *>(g))(job, thread); }, &f);
    }

   private:
    struct Start {
        Pool *pool;
        int thread;
    };

    void publish(int jobs, Job job, void *arguments);
    void work(int thread);
    bool claim_one(uint64_t word, int thread);
    static void *enter(void *start);

    // What can be claimed, in one word so that a claim cannot hit the wrong stage: stage | jobs | next job.
    alignas(64) std::atomic<uint64_t> word_{0};
    alignas(64) std::atomic<uint32_t> done_{0};  // jobs of this stage that are finished
    alignas(64) std::atomic<uint32_t> bell_{0};  // changes when sleeping threads shall look again
    std::atomic<uint32_t> asleep_{0};
    std::atomic<uint32_t> waiting_{0};  // the caller sleeps on done_
    std::atomic<bool> quit_{false};
    Job job_ = nullptr;
    void *arguments_ = nullptr;
    int threads_ = 1;
    pthread_t handles_[max_threads];
    Start starts_[max_threads];
    int started_ = 0;
};

}  // namespace bittern

#endif
