// What csrc/ needs of c10's macros where no torch is.
#pragma once

#define C10_HOST_DEVICE
#define C10_NOINLINE __attribute__((noinline))
