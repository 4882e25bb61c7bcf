// Runs the threads of a block as fibers on one CPU thread. A fiber runs until a barrier of its block
// or warp, an exchange between lanes included. Blocks run one after the other, those of a
// cooperative launch side by side. Shared memory starts as NaN and ends with a guard.
#include "cuda_runtime.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

dim3 threadIdx, blockIdx;

namespace emulation {

Device device;

namespace {

constexpr size_t kStack = 128 * 1024, kGuard = 256;
constexpr long kPatience = 1000000;  // rounds in which fibers do nothing but yield

struct Barrier {
  int members = 0, arrived = 0;
  unsigned generation = 0;

  void release_if_full() {
    if (arrived == 0 || arrived < members) return;
    arrived = 0;
    ++generation;
  }
};

struct Warp {
  Barrier barrier;
  uint64_t slots[32];
};

struct Block {
  dim3 index;
  std::vector<uint64_t> memory;
  size_t shared;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  unsigned thread;
  Block* block;
  ucontext_t start;
  jmp_buf state;
  bool started = false, done = false;
  const Barrier* waits_for = nullptr;
  unsigned generation = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;

  Warp& warp() { return block->warps[thread / 32]; }
  bool blocked() const { return waits_for && waits_for->generation == generation; }
};

std::map<const void*, size_t> allowed_shared;
int thread_order = 0;
int cooperative_launches = 0;
Fiber* running = nullptr;
jmp_buf scheduler;
const std::function<void()>* kernel_body;
bool progress;

void leave() {
  if (_setjmp(running->state) == 0) _longjmp(scheduler, 1);
}

void wait_at(Barrier& barrier) {
  progress = true;
  ++barrier.arrived;
  running->waits_for = &barrier;
  running->generation = barrier.generation;
  barrier.release_if_full();
  if (running->blocked()) leave();
  running->waits_for = nullptr;
}

void fiber_main() {
  (*kernel_body)();
  wait_copies(0);
  running->done = progress = true;
  // Threads that have left count as arrived.
  for (Barrier* barrier : {&running->block->barrier, &running->warp().barrier}) {
    --barrier->members;
    barrier->release_if_full();
  }
  _longjmp(scheduler, 1);
}

char* stacks(size_t count) {
  static char* memory = nullptr;
  static size_t have = 0;
  if (count > have) {
    if (memory) munmap(memory, have * kStack);
    memory = static_cast<char*>(mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    have = count;
  }
  return memory;
}

__attribute__((noinline)) void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = dim3(fiber.thread, 0, 0);
  blockIdx = fiber.block->index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// The order of the threads between barriers: 0 ascending; 1 descending; 2 drawn anew in each round,
// with threads that pause. A race between barriers gives different results.
void draw_order(std::vector<size_t>& order) {
  static uint64_t state = 1;
  const auto draw = [&](size_t below) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<size_t>((state >> 33) % below);
  };
  for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[draw(i + 1)]);
  order.resize(order.size() - order.size() / 4);
}

cudaError_t run_blocks(unsigned first, unsigned count, unsigned threads, size_t shared) {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Fiber> fibers(static_cast<size_t>(count) * threads);
  char* const stack = stacks(fibers.size());
  for (unsigned i = 0; i < count; ++i) {
    auto block = std::make_unique<Block>();
    block->index = dim3(first + i, 0, 0);
    block->shared = shared;
    block->memory.assign((shared + kGuard + 7) / 8 + 1, ~uint64_t{0});
    block->barrier.members = static_cast<int>(threads);
    block->warps.resize(threads / 32);
    for (Warp& warp : block->warps) warp.barrier.members = 32;
    for (unsigned t = 0; t < threads; ++t) {
      const size_t at = static_cast<size_t>(i) * threads + t;
      Fiber& fiber = fibers[at];
      fiber.thread = t;
      fiber.block = block.get();
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = stack + at * kStack;
      fiber.start.uc_stack.ss_size = kStack;
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, fiber_main, 0);
    }
    blocks.push_back(std::move(block));
  }
  std::vector<size_t> order(fibers.size());
  long idle = 0;
  for (;;) {
    progress = false;
    order.resize(fibers.size());
    std::iota(order.begin(), order.end(), size_t{0});
    if (thread_order == 1) std::reverse(order.begin(), order.end());
    if (thread_order == 2) draw_order(order);
    for (const size_t i : order)
      if (!fibers[i].done && !fibers[i].blocked()) resume(fibers[i]);
    const auto done = [](const Fiber& fiber) { return fiber.done; };
    if (std::all_of(fibers.begin(), fibers.end(), done)) break;
    const auto stuck = [](const Fiber& fiber) { return fiber.done || fiber.blocked(); };
    idle = progress ? 0 : idle + 1;
    if (idle > kPatience || std::all_of(fibers.begin(), fibers.end(), stuck)) {
      std::fprintf(stderr, "emulation: threads wait for one another forever\n");
      return cudaErrorLaunchFailure;
    }
  }
  for (const auto& block : blocks) {
    const char* end = reinterpret_cast<const char*>(block->memory.data()) + 8 + shared;
    for (size_t i = 0; i + 16 < kGuard; ++i)
      if (end[i] != static_cast<char>(0xff)) {
        std::fprintf(stderr, "emulation: write behind the shared memory\n");
        return cudaErrorLaunchFailure;
      }
  }
  return cudaSuccess;
}

}  // namespace

char* dynamic_shared() {
  const auto at = reinterpret_cast<uintptr_t>(running->block->memory.data());
  return reinterpret_cast<char*>((at + 15) / 16 * 16);
}
void block_barrier() { wait_at(running->block->barrier); }
void warp_barrier() { wait_at(running->warp().barrier); }
void yield() { leave(); }
int lane() { return static_cast<int>(running->thread % 32); }
uint64_t& lane_slot(int lane) { return running->warp().slots[lane]; }

void copy_async(void* to, const void* from, size_t bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) std::abort();
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    std::abort();
  // A copy happens at any time between start and wait: in one order at once, else at the wait.
  if (thread_order == 1)
    std::memcpy(to, from, bytes);
  else
    running->open.push_back({to, from, bytes});
}
void commit_copies() {
  running->committed.push_back(std::move(running->open));
  running->open.clear();
}
void wait_copies(size_t groups_left) {
  while (running->committed.size() > groups_left) {
    for (const Copy& copy : running->committed.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    running->committed.pop_front();
  }
}

void allow_shared(const void* kernel, size_t bytes) { allowed_shared[kernel] = bytes; }

int blocks_per_processor(size_t shared) {
  // 1 KiB of each block is the system's; 128 registers of 256 threads allow two.
  return static_cast<int>(std::min<size_t>(2, (device.shared + 1024) / (shared + 1024)));
}

cudaError_t run(const void* kernel, const std::function<void()>& body, dim3 grid, dim3 block,
                size_t shared, bool cooperative) {
  if (block.x % 32 || block.x > 1024 || grid.x == 0) return cudaErrorInvalidConfiguration;
  const auto found = allowed_shared.find(kernel);
  const size_t allowed = found == allowed_shared.end() ? 0 : found->second;
  if (shared > std::max<size_t>(48 * 1024, allowed)) return cudaErrorInvalidValue;
  kernel_body = &body;
  if (cooperative) {
    if (static_cast<int>(grid.x) > device.processors * blocks_per_processor(shared))
      return cudaErrorCooperativeLaunchTooLarge;
    ++cooperative_launches;
    return run_blocks(0, grid.x, block.x, shared);
  }
  for (unsigned i = 0; i < grid.x; ++i)
    if (const cudaError_t error = run_blocks(i, 1, block.x, shared)) return error;
  return cudaSuccess;
}

}  // namespace emulation

namespace {

struct RaceParams {
  float* out;
};

// Reads what other threads write without a barrier in between.
void race_kernel(RaceParams p) {
  float* shared = reinterpret_cast<float*>(emulation::dynamic_shared());
  if (threadIdx.x == 0) shared[0] = 0;
  __syncthreads();
  shared[0] = 2 * shared[0] + static_cast<float>(threadIdx.x);
  if (threadIdx.x == 7) *p.out = shared[0];
}

}  // namespace

extern "C" int emulation_race() {
  float out = 0;
  RaceParams params{&out};
  void* arguments[] = {&params};
  cudaLaunchKernel(race_kernel, dim3(1), dim3(32), arguments, 4, nullptr);
  return static_cast<int>(out);
}

extern "C" int emulation_cooperative_launches() { return emulation::cooperative_launches; }

extern "C" void emulation_set(int order, int processors, int cache, int shared) {
  emulation::device.shared = shared;
  emulation::thread_order = order;
  emulation::device.processors = processors;
  emulation::device.cache = cache;
}
