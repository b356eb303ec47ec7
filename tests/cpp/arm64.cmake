# A toolchain file: tests of the CPU kernels for arm64, on another processor. They need
# only the headers in TORCH_DIR: libtorch is not linked. The emulated processors are chosen in
# CMakeLists.txt.
#
#   cmake -B build-arm64 -DCMAKE_TOOLCHAIN_FILE=tests/cpp/arm64.cmake -DROPE_EXT_CUDA=off
#   cmake --build build-arm64 --target test_kernels && ctest --test-dir build-arm64 -R kernels
#
# Needs a cross compiler and an emulator: g++-aarch64-linux-gnu and qemu-user of Debian and Ubuntu.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)  # else the emulator looks for that processor's libraries
find_program(ROPE_EXT_QEMU NAMES qemu-aarch64 qemu-aarch64-static REQUIRED)
set(CMAKE_CROSSCOMPILING_EMULATOR ${ROPE_EXT_QEMU})
