# The optional CUDA module. Needs nvcc and the static CUDA runtime, neither a driver nor cuFFT: that is opened at run
# time. AUTO builds it where nvcc works, ON insists, OFF does not look.
include(${CMAKE_CURRENT_LIST_DIR}/cuda_sources.cmake)
list(TRANSFORM FREEMERGE_CUDA_KERNELS PREPEND csrc/)
list(TRANSFORM FREEMERGE_CUDA_HOST PREPEND csrc/)
list(TRANSFORM FREEMERGE_CUDA_BINDINGS PREPEND csrc/)

if(NOT FREEMERGE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "FREEMERGE_CUDA must be AUTO, ON or OFF, not '${FREEMERGE_CUDA}'")
endif()

# Those of the GPUs that the driver's tool sees here and `nvcc` can compile for, each with PTX for later ones; empty if
# there are none.
function(freemerge_own_architectures result nvcc)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE capabilities RESULT_VARIABLE failed ERROR_QUIET)
  execute_process(COMMAND "${nvcc}" --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
  set(architectures "")
  if(failed STREQUAL "0")
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${capabilities}")
    foreach(capability IN LISTS capabilities)
      string(REPLACE "." "" architecture "${capability}")
      if("${known}" MATCHES "compute_${architecture}\n")
        list(APPEND architectures ${architecture})
      endif()
    endforeach()
    list(REMOVE_DUPLICATES architectures)
  endif()
  set(${result} "${architectures}" PARENT_SCOPE)
endfunction()

# Leaves CMAKE_CUDA_COMPILER false where there is no compiler that works.
macro(freemerge_find_nvcc)
  if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(FREEMERGE_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
    mark_as_advanced(FREEMERGE_NVCC)
    if(FREEMERGE_NVCC)
      # By the environment: once CMAKE_CUDA_COMPILER is set, a broken nvcc would be an error instead of an answer.
      set(ENV{CUDACXX} "${FREEMERGE_NVCC}")
    endif()
  endif()
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    # Must be set before the language is enabled.
    freemerge_own_architectures(CMAKE_CUDA_ARCHITECTURES "$ENV{CUDACXX}")
    if(NOT CMAKE_CUDA_ARCHITECTURES)
      # A100, H100, and PTX for whatever comes later.
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 90-virtual)
    endif()
  endif()
  if(DEFINED ENV{CUDACXX})
    # The toolkit in wheel form has lib/ where nvcc looks for lib64/.
    file(REAL_PATH "$ENV{CUDACXX}" freemerge_nvcc)
    cmake_path(GET freemerge_nvcc PARENT_PATH freemerge_toolkit)
    cmake_path(GET freemerge_toolkit PARENT_PATH freemerge_toolkit)
    if(EXISTS "${freemerge_toolkit}/lib/libcudart_static.a" AND NOT EXISTS "${freemerge_toolkit}/lib64")
      set(ENV{NVCC_APPEND_FLAGS} "$ENV{NVCC_APPEND_FLAGS} -L${freemerge_toolkit}/lib")
      link_directories("${freemerge_toolkit}/lib")
    endif()
  endif()
  include(CheckLanguage)
  check_language(CUDA)
endmacro()

if(NOT FREEMERGE_CUDA STREQUAL "OFF")
  freemerge_find_nvcc()
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
  elseif(FREEMERGE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FREEMERGE_CUDA is ON, but no working nvcc was found: put it in PATH, or set CUDA_HOME or CUDACXX")
  endif()
endif()

if(FREEMERGE_CUDA STREQUAL "OFF" OR NOT CMAKE_CUDA_COMPILER)
  message(STATUS "freemerge: building without CUDA")
  return()
endif()
message(STATUS "freemerge: building with CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")

# nvcc sees the kernels only, never Python or pybind11.
add_library(freemerge_cuda_kernels OBJECT ${FREEMERGE_CUDA_KERNELS})
target_include_directories(freemerge_cuda_kernels PRIVATE csrc)
set_target_properties(freemerge_cuda_kernels PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
  CUDA_VISIBILITY_PRESET hidden POSITION_INDEPENDENT_CODE ON)
target_compile_options(freemerge_cuda_kernels PRIVATE -lineinfo "SHELL:-Xptxas -v,-warn-spills" "SHELL:-Xcompiler -Wall,-Wextra")
if(FREEMERGE_WERROR)
  target_compile_options(freemerge_cuda_kernels PRIVATE -Werror=all-warnings "SHELL:-Xptxas -Werror")
endif()
# A fused multiply-add in the mask would move bins that lie exactly on a cutoff.
set_source_files_properties(csrc/cuda/coarse_mask.cu csrc/cuda/column_filter.cu PROPERTIES COMPILE_OPTIONS -fmad=false)

pybind11_add_module(_cuda MODULE ${FREEMERGE_CUDA_BINDINGS} ${FREEMERGE_CUDA_HOST})
string(REPLACE ";" " " freemerge_architectures "${CMAKE_CUDA_ARCHITECTURES}")
target_compile_definitions(_cuda PRIVATE FREEMERGE_CUDA_MODULE=_cuda
  "FREEMERGE_CUDA_ARCHITECTURES=\"${freemerge_architectures}\"")
target_include_directories(_cuda PRIVATE csrc)
target_include_directories(_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
# As for the kernels above: the host finds the rows at which a mask steps.
target_compile_options(_cuda PRIVATE -ffp-contract=off ${FREEMERGE_WARNINGS})
target_link_libraries(_cuda PRIVATE freemerge_cuda_kernels ${CMAKE_DL_LIBS})
# The static runtime's symbols must not meet those of the shared one that torch loads.
target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)
set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)

# Where a cufft.h exists, our mirror of it is checked; nothing else of cuFFT is needed.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
    "import os, sys; print(';'.join(p for s in sys.path for d in ('cu13', 'cufft') if os.path.isdir(p := os.path.join(s, 'nvidia', d, 'include'))))"
  OUTPUT_VARIABLE FREEMERGE_NVIDIA_WHEELS OUTPUT_STRIP_TRAILING_WHITESPACE)
find_path(FREEMERGE_CUFFT_INCLUDE cufft.h HINTS ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES}
  PATHS ${FREEMERGE_NVIDIA_WHEELS} NO_CMAKE_FIND_ROOT_PATH)
mark_as_advanced(FREEMERGE_CUFFT_INCLUDE)
if(FREEMERGE_CUFFT_INCLUDE)
  message(STATUS "freemerge: checking the cuFFT declarations against ${FREEMERGE_CUFFT_INCLUDE}/cufft.h")
  set_property(SOURCE csrc/cuda/cufft_api.cpp APPEND PROPERTY COMPILE_DEFINITIONS FREEMERGE_HAVE_CUFFT_H)
  set_property(SOURCE csrc/cuda/cufft_api.cpp APPEND PROPERTY INCLUDE_DIRECTORIES ${FREEMERGE_CUFFT_INCLUDE})
endif()

install(TARGETS _cuda LIBRARY DESTINATION freemerge)
