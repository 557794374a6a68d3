// The number of threads that threads.cpp gives to the kernels.
#pragma once

namespace fuzz {
void set_threads(int count);
}
