// Several stacks that one thread of the host runs on in turn. ucontext works everywhere, but makes
// a system call for the signal mask at every switch, and AddressSanitizer then clears the stack's
// whole shadow. On processors for which this file has the few necessary instructions, those are
// used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)

// Saves the callee-saved registers and the stack pointer, and continues where the other context was
// saved.
extern "C" void mghf_host_switch(void** from, void* to);
asm(R"(
.text
.type mghf_host_switch, @function
mghf_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mghf_host_switch, .-mghf_host_switch
)");

namespace mghf::host {

class Context {
 public:
  // The context will call `entry`, which must not return, on the stack of that many bytes.
  void prepare(void* stack, size_t bytes, void (*entry)()) {
    constexpr size_t kSaved = 6;
    uintptr_t words[kSaved + 2] = {};  // the registers, the entry, and no caller
    words[kSaved] = reinterpret_cast<uintptr_t>(entry);
    top_ = static_cast<unsigned char*>(stack) + bytes - sizeof words;
    std::memcpy(top_, words, sizeof words);
  }
  void switch_to(Context& next) { mghf_host_switch(&top_, next.top_); }

 private:
  void* top_ = nullptr;
};

}  // namespace mghf::host

#else

#include <ucontext.h>

namespace mghf::host {

class Context {
 public:
  void prepare(void* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void switch_to(Context& next) { swapcontext(&context_, &next.context_); }

 private:
  ucontext_t context_;
};

}  // namespace mghf::host

#endif
