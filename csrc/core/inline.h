/* inline.h: functions in headers that cc compiles for the host and nvcc for both sides. */
#ifndef QL_INLINE_H
#define QL_INLINE_H

#ifdef __CUDACC__
#define QL_INLINE static inline __host__ __device__
#else
#define QL_INLINE static inline
#endif

#endif
