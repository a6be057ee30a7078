// Which instruction set runs, and the memory of each thread.
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace poolformer::cpu {
namespace {

struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx_bf16 = false, fp16 = false;
};

Features detect() {
  Features f;
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;
  bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
  f.avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (f.avx512 && __get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    unsigned subleaves = a;
    f.amx_bf16 = d & (1u << 22);
    f.fp16 = d & (1u << 23);
    if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avx512_bf16 = a & (1u << 5);
  }
#endif
  return f;
}

const Features& features() {
  static const Features f = detect();
  return f;
}

std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> list;
#if defined(__x86_64__)
  if (features().avx512_bf16) list.push_back(&kernels_avx512_bf16);
  if (features().avx512) list.push_back(&kernels_avx512);
  if (features().avx2) list.push_back(&kernels_avx2);
#endif
  list.push_back(&kernels_default);
  return list;
}

const Kernels* find(const std::string& name, const char* from) {
  std::string known;
  for (const Kernels* table : tables()) {
    if (name == table->name) return table;
    known += (known.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::invalid_argument(from + std::string(" is '") + name +
                              "', which this CPU cannot run; it can run: " + known);
}

const Kernels* initial() {
  const char* name = std::getenv("POOLFORMER_CPU_CAPABILITY");
  return name && *name ? find(name, "POOLFORMER_CPU_CAPABILITY") : tables().front();
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{initial()};
  return table;
}

std::atomic<int64_t>& wanted_tasks() {
  static std::atomic<int64_t> tasks{0};
  return tasks;
}

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Kernels* table : tables()) names.push_back(table->name);
  return names;
}

void set_capability(const std::string& name) { current() = find(name, "the CPU capability"); }

bool has_amx_bf16() { return features().amx_bf16; }
bool has_native_fp16() { return features().fp16; }

void* scratch(size_t bytes, Scratch purpose) {
  struct Memory {
    std::unique_ptr<void, AlignedDelete> data;
    size_t size = 0;
  };
  thread_local std::array<Memory, static_cast<size_t>(Scratch::kCount)> all;
  Memory& memory = all[static_cast<size_t>(purpose)];
  if (bytes > memory.size) {
    memory.data.reset();
    memory.size = 0;
    memory.data.reset(::operator new(bytes, std::align_val_t{64}));
    memory.size = bytes;
  }
  return memory.data.get();
}

int64_t backward_tasks() {
  int64_t set = wanted_tasks().load(std::memory_order_relaxed);
  if (set > 0) return set;
  static const int64_t tasks = [] {
    int64_t cores = std::thread::hardware_concurrency(), power = 8;
    while (power < cores && power < 64) power *= 2;
    return power;
  }();
  return tasks;
}

void set_backward_tasks(int64_t tasks) { wanted_tasks() = tasks; }

int64_t l2_bytes() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0) return size;
#endif
    return int64_t{512} << 10;
  }();
  return bytes;
}

}  // namespace poolformer::cpu
