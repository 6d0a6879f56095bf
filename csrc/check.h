// What the parts of the check program share.
#ifndef BITTERN_CHECK_H
#define BITTERN_CHECK_H

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "bittern.h"

namespace {

template <typename T>
using Buffer = std::unique_ptr<T[]>;  // exactly as long as asked for: a sanitizer sees the first element beyond

template <typename T>
Buffer<T> make(int64_t count) {
    return Buffer<T>(new T[static_cast<size_t>(count)]());
}

template <typename... Arguments>
void expect(bool holds, const char *format, Arguments... arguments) {
    if (holds) return;
    fprintf(stderr, format, arguments...);
    fputc('\n', stderr);
    exit(1);
}

uint64_t random_state = 1;
uint32_t random_bits() {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(random_state >> 33);
}
int random_below(int end) { return static_cast<int>(random_bits() % static_cast<uint32_t>(end)); }
float random_float() { return static_cast<float>(random_below(1 << 24) - (1 << 23)) * 0x1p-23f; }

}  // namespace

#endif
