import CHints
import FasterMoE
import Glibc

// Every allocation in the library, Swift's runtime included, is linked to call these (Package.swift): what the system refuses
// comes from the reserve.

@_cdecl("__wrap_malloc") @implementation
public func __wrap_malloc(_ size: Int) -> UnsafeMutableRawPointer! { __real_malloc(size) ?? Reserve.take(size) }

@_cdecl("__wrap_calloc") @implementation
public func __wrap_calloc(_ count: Int, _ size: Int) -> UnsafeMutableRawPointer! {
  if let block = __real_calloc(count, size) { return block }
  let (bytes, isTooLarge) = count.multipliedReportingOverflow(by: size)
  guard !isTooLarge, let block = Reserve.take(bytes) else { return nil }
  return memset(block, 0, bytes)
}

@_cdecl("__wrap_realloc") @implementation
public func __wrap_realloc(_ block: UnsafeMutableRawPointer!, _ size: Int) -> UnsafeMutableRawPointer! {
  if let moved = __real_realloc(block, size) { return moved }
  guard size > 0, let moved = Reserve.take(size) else { return nil }
  if let block {
    memcpy(moved, block, min(size, malloc_usable_size(block)))
    free(block)
  }
  return moved
}

@_cdecl("__wrap_posix_memalign") @implementation
public func __wrap_posix_memalign(
  _ out: UnsafeMutablePointer<UnsafeMutableRawPointer?>!, _ alignment: Int, _ size: Int
) -> Int32 {
  let status = __real_posix_memalign(out, alignment, size)
  guard status != 0, alignment <= Reserve.alignment, let block = Reserve.take(size) else { return status }
  out.pointee = block
  return 0
}

/// C++'s operator new; its operator delete frees.
@_cdecl("__wrap__Znwm") @implementation
public func __wrap__Znwm(_ size: Int) -> UnsafeMutableRawPointer! { __wrap_malloc(size) }

@_cdecl("__wrap__ZnwmSt11align_val_t") @implementation
public func __wrap__ZnwmSt11align_val_t(_ size: Int, _ alignment: Int) -> UnsafeMutableRawPointer! {
  var block: UnsafeMutableRawPointer?
  _ = __wrap_posix_memalign(&block, max(alignment, MemoryLayout<Int>.size), size)
  return block
}

/// glibc's CPU_ALLOC, where hwloc takes no refusal; its CPU_FREE frees.
@_cdecl("__wrap___sched_cpualloc") @implementation
public func __wrap___sched_cpualloc(_ count: Int) -> UnsafeMutableRawPointer! {
  __wrap_malloc((count + UInt.bitWidth - 1) / UInt.bitWidth * MemoryLayout<UInt>.size)
}
