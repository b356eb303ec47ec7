// What compilers of today take from libraries of today, brought along: so that one binary runs on
// all systems of the policy manylinux_2_28 (glibc 2.28, libstdc++ of GCC 8), as PyTorch's own does.
//
// Each has the name of a symbol that such systems lack. They are hidden, as all but PyInit__C is:
// other libraries in the process go on using their own, and ours does not get those that some
// builds of libtorch.so export, which do not go with the rest of the system's libstdc++.
#include <new>
#include <sstream>

#ifdef __GLIBCXX__

namespace rope {

// glibc 2.32: whether there is one thread, for reference counts to do without atomic instructions.
// 0 is "maybe more", which is always right.
extern char single_threaded __asm__("__libc_single_threaded");
char single_threaded = 0;

// GCC 11: what containers do about a size that overflows.
[[noreturn]] void throw_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// GCC 9: constructors without arguments. Those with a mode are older.
void construct(std::ostringstream* stream) __asm__(
    "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void construct(std::ostringstream* stream) { new (stream) std::ostringstream(std::ios::out); }

void construct(std::stringstream* stream) __asm__(
    "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void construct(std::stringstream* stream) {
  new (stream) std::stringstream(std::ios::in | std::ios::out);
}

}  // namespace rope

#endif
