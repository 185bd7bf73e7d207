// SPDX-License-Identifier: Apache-2.0
// Memory of large results on the CPU. A fresh one of 12 MB costs as long in page faults and zeroing as a third of the
// noise that fills it, so that of results that are gone is kept and handed out again.
#pragma once
#include <cstddef>
#include <cstdint>

namespace nimfast {

// The memory behind one tensor: aligned to 2 MB pages, which the system is asked for, of any content. Made and
// destroyed under Python's global lock, which is all the locking there is: it also keeps a fork out of the middle.
class Block {
 public:
  explicit Block(size_t bytes);  // throws std::bad_alloc
  ~Block();                      // keeps the memory for another, within the bounds of cpu_memory.cpp
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_, capacity_;
  void* data_;
};

// Room for at least `floats` floats, aligned to 64 bytes, of any content, until the calling thread asks for the same
// again. The thread keeps it to its end.
enum class Scratch { kKernel, kCaller };  // kCaller: of a kernel that calls others
float* thread_scratch(int64_t floats, Scratch whose = Scratch::kKernel);

size_t idle_bytes();    // of the memory that is kept
void release_memory();  // give all of it back to the system

}  // namespace nimfast
