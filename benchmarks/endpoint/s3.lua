-- Just enough of S3 for a benchmark, at next to no cost. It checks no signatures, and unless it is told to, it keeps
-- nothing that is uploaded:
--
-- * An upload is read to its last byte before it is answered, and counted. (A server that answers at once makes some
--   clients stop sending: they look fast, and carried nothing.) What is left is a file of the same length with no
--   content, so that asking for its size or listing it works.
-- * A download is served from a file that the benchmark has put into data/<bucket>/<key>.
--
-- Where it keeps what is uploaded, all parts of an upload but the last must have the size of the first, which comes
-- first: then each is written where it belongs.
--
-- Plain, or shaped: a latency before every answer, and a rate that no connection exceeds, up or down. Where it takes only
-- so many requests a second, the others are answered 503 SlowDown at once, as S3 does.

local ffi = require "ffi"
ffi.cdef "int truncate(const char *path, long length);"

local M = {}
local DATA = ngx.config.prefix() .. "data/"
local STAGED = ngx.config.prefix() .. "tmp/upload-"
local PIECE = 32768  -- bytes; small enough to stay in the processor's cache
local XML = '<?xml version="1.0" encoding="UTF-8"?>\n'
local KINDS = { "create", "part", "complete", "abort", "put", "get", "head", "list", "delete", "slowed" }
local latency, rate, most, keeps = 0, 0, 0, false

function M.configure(options)
    latency, rate, most, keeps = options.latency, options.rate, options.most, options.keeps
end

-- What a request does: one of KINDS.
local function kind_of(method, query, key)
    if method == "PUT" then return query.partNumber and "part" or "put" end
    if method == "POST" then return query.uploads and "create" or query.uploadId and "complete" or "delete" end
    if method == "DELETE" then return query.uploadId and "abort" or "delete" end
    if method == "HEAD" then return "head" end
    return key == "" and "list" or "get"
end

-- Requests by kind, since the endpoint started; "slowed" are those that were answered 503.
function M.requests()
    local found = {}
    for _, kind in ipairs(KINDS) do
        found[#found + 1] = string.format('"%s": %d', kind, ngx.shared.counters:get("requests " .. kind) or 0)
    end
    ngx.header.content_type = "application/json"
    ngx.print("{" .. table.concat(found, ", ") .. "}")
end

-- Counts a request; whether it is one too many in this second.
local function is_too_many(kind)
    local counters = ngx.shared.counters
    if most > 0 and counters:incr("second " .. math.floor(ngx.now()), 1, 0, 10) > most then
        counters:incr("requests slowed", 1, 0)
        return true
    end
    counters:incr("requests " .. kind, 1, 0)
    return false
end

-- Bytes of bodies, since the endpoint started.
function M.counters()
    local counters = ngx.shared.counters
    ngx.header.content_type = "application/json"
    ngx.print(string.format('{"received": %d, "sent": %d}', counters:get("received") or 0, counters:get("sent") or 0))
end

function M.count_sent()
    if ngx.req.get_method() == "GET" then
        ngx.shared.counters:incr("sent", tonumber(ngx.var.body_bytes_sent), 0)
    end
end

local function answer(body, status)
    ngx.status = status or 200
    ngx.header.content_type = "application/xml"
    ngx.header.content_length = #body
    ngx.print(body)
    return ngx.exit(ngx.HTTP_OK)
end

local function answer_empty(status, etag)
    ngx.status = status
    ngx.header.ETag = etag
    if status ~= 204 then ngx.header.content_length = 0 end
    return ngx.exit(status)
end

local function escape(text)
    return (text:gsub("[&<>]", { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;" }))
end

local function quote(path)
    return "'" .. path:gsub("'", "'\\''") .. "'"
end

-- Sleeps until `sent` bytes since `began` are no more than the rate allows.
local function pace(began, sent)
    if rate > 0 then
        ngx.update_time()
        local ahead = sent / rate - (ngx.now() - began)
        if ahead > 0.001 then ngx.sleep(ahead) end
    end
end

-- Opens a file to write; makes its directory.
local function create(path)
    local file = io.open(path, "w")
    if not file then
        os.execute("mkdir -p " .. quote(path:match("^(.*)/")))
        file = assert(io.open(path, "w"))
    end
    return file
end

-- Reads the request's body, into a file or to throw it away. Returns how many bytes of object it held, nil if it broke
-- off.
local function drain(file)
    ngx.update_time()
    local began, length = ngx.now(), tonumber(ngx.var.http_content_length)
    if length then
        local socket, read = length > 0 and assert(ngx.req.socket()), 0
        if socket then socket:settimeout(60000) end
        while read < length do
            local data = socket:receiveany(PIECE)
            if not data then return nil end
            if file then file:write(data) end
            read = read + #data
            pace(began, read)
        end
    else  -- "Transfer-Encoding: chunked", as botocore sends over https: the socket above does not read that
        assert(not file, "chunks are not kept")
        ngx.req.read_body()
        length = tonumber(ngx.var.request_length)
        pace(began, length)
    end
    -- With "aws-chunked" encoding the body also holds checksums and chunk headers. The header is only believed as far
    -- as that much was read.
    length = math.min(length, tonumber(ngx.var.http_x_amz_decoded_content_length) or length)
    ngx.shared.counters:incr("received", length, 0)
    return length
end

-- Leaves an object of that size, without content.
local function leave(name, size)
    local path = DATA .. name
    create(path):close()
    ffi.C.truncate(path, size)
end

-- Makes a file an object. Returns its ETag as nginx makes it: of its time and size.
local function keep(name, staged)
    local path = DATA .. name
    create(path):close()
    assert(os.rename(staged, path))
    local told = io.popen("stat -c '%Y %s' " .. quote(path))
    local time, size = told:read("*n", "*n")
    told:close()
    return string.format('"%x-%x"', time, size)
end

-- The file of an upload, open where a part of it belongs.
local function open_part(id, number, size)
    local uploads, path = ngx.shared.uploads, STAGED .. id
    if number == 1 then uploads:set(id .. " size", size) end
    local file = io.open(path, "r+") or create(path)
    file:seek("set", (number - 1) * uploads:get(id .. " size"))
    return file
end

-- CopyObject: some clients upload under a temporary name.
local function copy(name, source)
    local path = DATA .. ngx.unescape_uri(source):gsub("^/", "")
    local file = io.open(path, "rb")
    if not file then return answer("<Error><Code>NoSuchKey</Code></Error>", 404) end
    local etag = '"' .. ngx.md5(name) .. '"'
    if keeps then
        os.execute("cp " .. quote(path) .. " " .. quote(STAGED .. ngx.var.request_id))
        etag = keep(name, STAGED .. ngx.var.request_id)
    else
        leave(name, file:seek("end"))
    end
    file:close()
    return answer(XML .. "<CopyObjectResult><ETag>" .. etag:gsub('"', "&quot;") .. "</ETag></CopyObjectResult>")
end

local function put(name, query)
    if ngx.var.http_x_amz_copy_source then return copy(name, ngx.var.http_x_amz_copy_source) end
    local number, staged, file = tonumber(query.partNumber), STAGED .. ngx.var.request_id
    if keeps then
        file = number and open_part(query.uploadId, number, tonumber(ngx.var.http_content_length)) or create(staged)
    end
    local size = drain(file)
    if file then file:close() end
    if not size then return ngx.exit(499) end
    if query.partNumber then
        ngx.shared.uploads:set(query.uploadId .. ":" .. query.partNumber, size)
        return answer_empty(200, '"' .. ngx.md5(name .. query.partNumber) .. '"')
    end
    if keeps then return answer_empty(200, keep(name, staged)) end
    leave(name, size)
    return answer_empty(200, '"' .. ngx.md5(name .. size) .. '"')  -- as get_shaped says
end

local function start_upload(bucket, key)
    local id = string.format("%x", ngx.shared.uploads:incr("last", 1, 0))
    return answer(XML .. "<InitiateMultipartUploadResult><Bucket>" .. bucket .. "</Bucket><Key>" .. escape(key)
        .. "</Key><UploadId>" .. id .. "</UploadId></InitiateMultipartUploadResult>")
end

local function complete_upload(bucket, key, id)
    ngx.req.read_body()
    local size, last, etag = 0, nil, '"' .. ngx.md5(key) .. '-1"'
    for number in ngx.req.get_body_data():gmatch("<PartNumber>%s*(%d+)%s*</PartNumber>") do
        local part = ngx.shared.uploads:get(id .. ":" .. number)
        if not part then return answer("<Error><Code>InvalidPart</Code></Error>", 400) end
        assert(not keeps or not last or last == ngx.shared.uploads:get(id .. " size"), "parts of several sizes")
        size, last = size + part, part
    end
    if keeps then
        etag = keep(bucket .. "/" .. key, STAGED .. id)
    else
        leave(bucket .. "/" .. key, size)
    end
    return answer(XML .. "<CompleteMultipartUploadResult><Bucket>" .. bucket .. "</Bucket><Key>" .. escape(key)
        .. "</Key><ETag>" .. etag:gsub('"', "&quot;") .. "</ETag></CompleteMultipartUploadResult>")
end

local function delete_objects(bucket)
    ngx.req.read_body()
    for key in ngx.req.get_body_data():gmatch("<Key>(.-)</Key>") do os.remove(DATA .. bucket .. "/" .. key) end
    return answer(XML .. "<DeleteResult/>")
end

-- ListObjects and ListObjectsV2, one page, with the delimiter that clients use to look for directories.
local function list(bucket, query)
    local prefix, delimiter = query.prefix or "", query.delimiter
    local out, seen = {}, {}
    local find = "cd " .. quote(DATA .. bucket) .. " 2>/dev/null && find . -type f -printf '%P\\t%s\\n' | LC_ALL=C sort"
    local lines = io.popen(find)
    for line in lines:lines() do
        local key, size = line:match("^(.-)\t(%d+)$")
        if key:sub(1, #prefix) == prefix then
            local cut = delimiter and key:find(delimiter, #prefix + 1, true)
            if not cut then
                out[#out + 1] = "<Contents><Key>" .. escape(key) .. "</Key><Size>" .. size
                    .. "</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;" .. ngx.md5(key)
                    .. "&quot;</ETag><StorageClass>STANDARD</StorageClass></Contents>"
            elseif not seen[key:sub(1, cut)] then
                seen[key:sub(1, cut)] = true
                out[#out + 1] = "<CommonPrefixes><Prefix>" .. escape(key:sub(1, cut)) .. "</Prefix></CommonPrefixes>"
            end
        end
    end
    lines:close()
    return answer(XML .. "<ListBucketResult><Name>" .. bucket .. "</Name><Prefix>" .. escape(prefix) .. "</Prefix><KeyCount>"
        .. #out .. "</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>" .. table.concat(out)
        .. "</ListBucketResult>")
end

-- A download at the rate of a shaped link. nginx's own limit_rate lets a second's worth through at once, which is
-- more than a client asks for in one range.
local function get_shaped(name)
    local file = io.open(DATA .. name, "rb")
    local size = file and file:seek("end")
    if not size or size > 2 ^ 60 then return ngx.exec("@no_such_key") end  -- a directory has a size of 2^63 - 1
    local first, last = 0, size - 1
    local from, to = (ngx.var.http_range or ""):match("^bytes=(%d*)-(%d*)$")
    if from == "" then
        first = math.max(0, size - tonumber(to))
    elseif from then
        first, last = tonumber(from), math.min(last, tonumber(to) or last)
    end
    if first > last and size > 0 then return answer("<Error><Code>InvalidRange</Code></Error>", 416) end
    if from then
        ngx.status = 206
        ngx.header.content_range = string.format("bytes %d-%d/%d", first, last, size)
    end
    ngx.header.etag = '"' .. ngx.md5(name .. size) .. '"'
    ngx.header.last_modified = "Thu, 01 Jan 2026 00:00:00 GMT"
    ngx.header.accept_ranges = "bytes"
    ngx.header.content_length = last - first + 1
    ngx.send_headers()
    if ngx.req.get_method() == "GET" then
        file:seek("set", first)
        ngx.update_time()
        local began, sent, total = ngx.now(), 0, last - first + 1
        while sent < total do
            local data = file:read(math.min(PIECE, total - sent))
            if not data or not ngx.print(data) or not ngx.flush(true) then break end
            sent = sent + #data
            pace(began, sent)
        end
    end
    file:close()
end

function M.handle()
    local method, query = ngx.req.get_method(), ngx.req.get_uri_args()
    local bucket, key = ngx.var.uri:match("^/([^/]+)/?(.*)$")
    if is_too_many(kind_of(method, query, key)) then
        return answer("<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>", 503)
    end
    if latency > 0 then ngx.sleep(latency) end
    local name = bucket .. "/" .. key
    if method == "PUT" then
        if key == "" then return answer_empty(200) end  -- buckets need not be made
        return put(name, query)
    elseif method == "POST" then
        if query.uploads then return start_upload(bucket, key) end
        if query.uploadId then return complete_upload(bucket, key, query.uploadId) end
        return delete_objects(bucket)  -- ?delete, all that is left
    elseif method == "DELETE" then
        if not query.uploadId then os.remove(DATA .. name) end
        return answer_empty(204)
    elseif key == "" then
        if method == "HEAD" then return answer_empty(200) end
        return list(bucket, query)
    elseif rate > 0 then
        return get_shaped(name)
    end
    return ngx.exec("@object")
end

return M
