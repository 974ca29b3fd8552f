#include "cuda/error.h"

namespace freemerge::cuda {
namespace {

std::string base_name(const std::string& path) { return path.substr(path.find_last_of('/') + 1); }

std::string describe(const std::string& operation, const std::string& reason, const char* file, int line) {
  return operation + " failed: " + reason + " (" + base_name(file) + ":" + std::to_string(line) + ")";
}

const char* cufft_result_name(int result) {
  static const char* const names[] = {"CUFFT_SUCCESS",
                                      "CUFFT_INVALID_PLAN",
                                      "CUFFT_ALLOC_FAILED",
                                      "CUFFT_INVALID_TYPE",
                                      "CUFFT_INVALID_VALUE",
                                      "CUFFT_INTERNAL_ERROR",
                                      "CUFFT_EXEC_FAILED",
                                      "CUFFT_SETUP_FAILED",
                                      "CUFFT_INVALID_SIZE",
                                      "CUFFT_UNALIGNED_DATA",
                                      "CUFFT_INCOMPLETE_PARAMETER_LIST",
                                      "CUFFT_INVALID_DEVICE",
                                      "CUFFT_PARSE_ERROR",
                                      "CUFFT_NO_WORKSPACE"};
  const bool known = result >= 0 && result < static_cast<int>(sizeof names / sizeof *names);
  return known ? names[result] : "cuFFT error";
}

}  // namespace

Error::Error(const std::string& operation_, const std::string& reason, int code_, const char* file_,
             int line_)
    : std::runtime_error(describe(operation_, reason, file_, line_)),
      operation(operation_),
      code(code_),
      file(base_name(file_)),
      line(line_) {}

void check(cudaError_t error, const char* operation, const char* file, int line) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // else the next launch would report it
  const std::string reason = std::string(cudaGetErrorName(error)) + ", " + cudaGetErrorString(error);
  throw Error(operation, reason, static_cast<int>(error), file, line);
}

void check_cufft(int result, const char* operation, const char* file, int line) {
  if (result == 0) return;
  throw Error(operation, std::string(cufft_result_name(result)) + " (" + std::to_string(result) + ")", result,
              file, line);
}

}  // namespace freemerge::cuda
