// SPDX-License-Identifier: Apache-2.0
#include "cpu_memory.h"

#include <cstdlib>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nimfast {
namespace {

constexpr size_t kPage = size_t{1} << 21;
constexpr size_t kMostIdle = size_t{256} << 20;  // bytes kept
constexpr size_t kMostPieces = 16;

struct Piece {
  void* data;
  size_t capacity;
};

// Oldest first. Never destroyed: tensors may outlive every static object.
std::vector<Piece>& idle() {
  static auto* pieces = new std::vector<Piece>;
  return *pieces;
}

void free_oldest() {
  std::free(idle().front().data);
  idle().erase(idle().begin());
}

}  // namespace

float* thread_scratch(int64_t floats, Scratch whose) {
  struct Room {
    float* data = nullptr;
    int64_t floats = 0;
    ~Room() { std::free(data); }
  };
  thread_local Room rooms[2];
  Room& room = rooms[static_cast<int>(whose)];
  if (room.floats < floats) {
    std::free(room.data);
    room.floats = (floats + 15) / 16 * 16;
    room.data = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(room.floats) * sizeof(float)));
    if (!room.data) throw std::bad_alloc();
  }
  return room.data;
}

size_t idle_bytes() {
  size_t total = 0;
  for (const Piece& piece : idle()) total += piece.capacity;
  return total;
}

void release_memory() {
  while (!idle().empty()) free_oldest();
}

Block::Block(size_t bytes) : bytes_(bytes), capacity_((bytes + kPage - 1) / kPage * kPage) {
  // The newest that fits, for the caches may still hold it; of a much larger one too much would lie unused.
  for (size_t i = idle().size(); i-- > 0;) {
    const Piece piece = idle()[i];
    if (piece.capacity < capacity_ || piece.capacity > capacity_ + capacity_ / 4) continue;
    data_ = piece.data;
    capacity_ = piece.capacity;
    idle().erase(idle().begin() + static_cast<std::ptrdiff_t>(i));
    return;
  }
  data_ = std::aligned_alloc(kPage, capacity_);
  if (!data_) {
    release_memory();
    data_ = std::aligned_alloc(kPage, capacity_);
  }
  if (!data_) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(data_, capacity_, MADV_HUGEPAGE);  // advice only: where the system has none to give, nothing changes
#endif
}

Block::~Block() {
  idle().push_back({data_, capacity_});
  while (idle().size() > kMostPieces || idle_bytes() > kMostIdle) free_oldest();
}

}  // namespace nimfast
