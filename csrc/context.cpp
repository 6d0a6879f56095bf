// Which instruction sets this machine runs, and contexts.
#include <new>

#include "context.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace {

using bittern::Kernels;

#if defined(__x86_64__)

bool bit(unsigned word, int index) { return (word >> index & 1) != 0; }

// What the operating system saves of the registers (XCR0).
uint64_t saved_state() {
    unsigned a, d;
    asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return static_cast<uint64_t>(d) << 32 | a;
}

// Tiles are off until a process asks for them.
bool tiles_granted() {
#if defined(__linux__)
    constexpr int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

bool runs(int set) {
    unsigned a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0 || !bit(c, 27)) return false;  // no xgetbv
    const bool fma = bit(c, 12), f16c = bit(c, 29);
    const uint64_t state = saved_state();
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
    const bool avx2 = bit(b, 5) && fma && f16c && (state & 0x6) == 0x6;
    if (set == BT_AVX2) return avx2;
    const bool avx512 = avx2 && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && bit(c, 11) &&
                        (state & 0xe6) == 0xe6;  // F, DQ, BW, VL, VNNI
    if (set == BT_AVX512) return avx512;
    return set == BT_AMX && avx512 && bit(d, 24) && bit(d, 25) && (state & 0x60000) == 0x60000 && tiles_granted();
}

#elif defined(__aarch64__)

bool runs(int set) {
#if defined(__linux__)
    return set == BT_NEON && (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return set == BT_NEON;
#endif
}

#else

bool runs(int) { return false; }

#endif

const Kernels *kernels_of(int set) {
    if (set == BT_SCALAR) return &bittern::kernels_scalar;
#if defined(__x86_64__)
    if (set == BT_AVX2) return &bittern::kernels_avx2;
    if (set == BT_AVX512) return &bittern::kernels_avx512;
    if (set == BT_AMX) return &bittern::kernels_amx;
#endif
#if defined(__aarch64__)
    if (set == BT_NEON) return &bittern::kernels_neon;
#endif
    return nullptr;
}

}  // namespace

extern "C" {

int bt_abi(void) { return BT_ABI; }

int bt_has(int set) {
    // Asked once: in a virtual machine a cpuid takes tens of microseconds.
    static const unsigned found = [] {
        unsigned sets = 1u << BT_SCALAR;
        for (int i = 0; i < BT_SETS; i++) {
            if (i != BT_SCALAR && kernels_of(i) != nullptr && runs(i)) sets |= 1u << i;
        }
        return sets;
    }();
    return set >= 0 && set < BT_SETS && (found >> set & 1) != 0;
}

int bt_best(void) {
    const int sets[] = {BT_AMX, BT_AVX512, BT_AVX2, BT_NEON};
    for (int set : sets) {
        if (bt_has(set)) return set;
    }
    return BT_SCALAR;
}

int bt_open(int threads, int set, bt_context **context) {
    if (context == nullptr || threads < 1 || threads > bittern::Pool::max_threads) return BT_BAD_ARGUMENT;
    if (!bt_has(set)) return BT_UNSUPPORTED;
    bt_context *c = new (std::nothrow) bt_context;
    if (c == nullptr) return BT_NO_MEMORY;
    c->kernels = kernels_of(set);
    if (!c->pool.start(threads)) {
        delete c;
        return BT_NO_THREAD;
    }
    *context = c;
    return 0;
}

void bt_close(bt_context *context) { delete context; }

}  // extern "C"
