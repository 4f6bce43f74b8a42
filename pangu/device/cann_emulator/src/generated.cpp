// Everything that no other file defines: each aclnn operator that torch_npu can look up and each other function that it
// links against, by name alone. They are weak, so that a definition written by hand takes their place.
//
// libraries.py writes the two lists from the installed torch_npu, and compiles this file once with each of them.
#include "emulator.h"

#define GENERATED extern "C" __attribute__((weak, visibility("default"))) emulator::Status

// The arguments are not known, nor needed: host code has set workspace size and executor to zero.
#define OPERATOR(name)                                                             \
  GENERATED name##GetWorkspaceSize() { return emulator::without_numerics(#name); } \
  GENERATED name() {                                                               \
    emulator::record_call("aclnn", #name);                                         \
    return emulator::kSuccess;                                                     \
  }

#define FUNCTION(name) \
  GENERATED name() { return emulator::fail(emulator::kNotSupported, #name " is not emulated"); }

#include GENERATED_LIST
