// Symbols that current compilers take from current releases of glibc and libstdc++, defined here,
// so that one binary runs on all systems of the policy manylinux_2_28 (glibc 2.28, libstdc++ of GCC
// 8), as PyTorch's own does.
//
// They are hidden, as all symbols but PyInit__C are: other libraries in the process keep using
// their own, and ours never binds to those that some builds of libtorch.so export, which do not fit
// the system's libstdc++.
#include <new>
#include <sstream>

#ifdef __GLIBCXX__

namespace rope {

// glibc 2.32: whether the process has one thread, so that reference counts need no atomic
// instructions. 0 means "maybe more", which is always right.
extern char single_threaded __asm__("__libc_single_threaded");
char single_threaded = 0;

// GCC 11: called by containers when a size overflows.
[[noreturn]] void throw_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// GCC 9: the constructors without arguments. Those that take a mode are older.
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
