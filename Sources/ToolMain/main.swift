import CHints
import Glibc
import Tool

// Where there is AVX-512, the tool that was built for it takes over, as the loader does it for the library: profiles say
// which one measured.
#if arch(x86_64) && !WIDE_VECTORS
  if hint_has_wide_vectors() != 0 {
    var own = [CChar](repeating: 0, count: Int(PATH_MAX))
    let length = readlink("/proc/self/exe", &own, own.count - 1)
    if length > 0, let name = own[..<length].lastIndex(of: CChar(bitPattern: UInt8(ascii: "/"))) {
      let folder = String(decoding: own[..<name].map { UInt8(bitPattern: $0) }, as: UTF8.self)
      execv("\(folder)/../lib/fastermoe/x86-64-v4/fastermoe", CommandLine.unsafeArgv)
    }
  }
#endif
exit(Tool.run(Array(CommandLine.arguments.dropFirst())))
