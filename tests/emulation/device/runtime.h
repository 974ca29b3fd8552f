// Switches of the emulated runtime, for tests.
#pragma once

namespace freemerge::emulation {

void refuse_launch();  // the next cudaGetLastError() reports an invalid launch configuration
void set_device_count_error(int cuda_error);  // 0: one device
void set_capturing(bool capturing);           // pretend that the calling thread's streams record a graph

}  // namespace freemerge::emulation
